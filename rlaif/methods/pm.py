"""Preference model: soft-label Bradley-Terry on TRL's RewardTrainer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlaif.config import Dtype, Keep, ModelConfig, PMConfig, Tuning
from rlaif.evaluation.preference_model import calibration, preference_metrics
from rlaif.losses import soft_bradley_terry
from rlaif.methods.supervised import (
    collate_comparisons,
    drop_long,
    group_comparisons,
    on_one_device,
    parts_by_length,
    peft_arguments,
    run_trainer,
    save_result,
    shares_prefix,
    trainer_arguments,
    with_targets,
)
from rlaif.models import is_adapter, load_sequence_scorer, load_tokenizer, merge, save_model, seed_everything
from rlaif.preference_model import (
    CALIBRATION,
    ENSEMBLE,
    PreferenceModel,
    encode_example,
    load_scorer,
    pm_config,
    separate_pad_token,
    training_scores,
)
from rlaif.processes import is_main, world_size
from rlaif.records import Preference, UserError, content_hash, read_json, write_json
from rlaif.siblings import joinable, lay_out, visible

log = logging.getLogger("rlaif")

# Without a validation split, scores are normalised on this many training pairs.
_REFERENCE_PAIRS = 256


class SoftRewardTrainer(RewardTrainer):
    """RewardTrainer whose loss takes ``p_chosen``, and which reads scores by position instead of by padding."""

    margin = 0.0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Soft Bradley-Terry plus centring over the pairs of the batch."""
        ids, positions, part = (inputs[name] for name in ("input_ids", "positions", "part"))
        prefix = inputs.get("prefix")
        lengths = (part >= 0).sum(dim=1)
        found = torch.zeros(part.shape, device=part.device)
        for rows in parts_by_length(lengths, prefix):
            some = slice(int(lengths[rows].max()))
            found[rows, some] = training_scores(
                model, ids[rows, some], visible(part[rows, some]), positions[rows, some], prefix
            )
        scores = found[inputs["row"], inputs["column"]]
        chosen, rejected = scores[inputs["chosen"]], scores[inputs["rejected"]]
        mode = "train" if model.training else "eval"
        # Held-out preferences are given their likelihood alone.
        margin, center = (self.margin, self.args.center_rewards_coefficient) if mode == "train" else (0.0, None)
        strength = (2 * inputs["p_chosen"] - 1) * margin
        losses = soft_bradley_terry(chosen - rejected - strength, inputs["p_chosen"])
        if center:
            losses = losses + center * (chosen + rejected) ** 2
        loss = (losses * inputs["weight"]).sum()
        self._metrics[mode]["accuracy"].append((chosen > rejected).float().mean().item())
        self._metrics[mode]["margin"].append((chosen - rejected).mean().item())
        return (loss, {"scores": scores}) if return_outputs else loss


def train_pm(
    config: PMConfig,
    start: ModelConfig,
    train: Sequence[Preference],
    validation: Sequence[Preference],
    folder: Path,
    seed: int,
    gold: str | None = None,
) -> Path:
    """Train a PM; writes ``preference_model/``, ``pm_metrics.json`` and ``training.jsonl`` into ``folder``.

    An ensemble has its members, with their curves, in ``preference_model/member-N/``.

    Raises:
        UserError: if there is nothing to choose weights on (``pm.keep=best``).
    """
    if config.model:
        start = replace(start, name=config.model, adapter=None, revision=None)
    target = folder / "preference_model"
    choice: list[Preference] = []
    if config.keep is Keep.best:
        choice, validation = _for_the_choice(validation)
    seen = validation or train[:_REFERENCE_PAIRS]
    if config.ensemble == 1:
        counts = _train_member(config, start, train, choice, seen, folder, target, seed)
    else:
        for number in range(config.ensemble):
            member = target / f"member-{number}"
            # Seeds of their own: those of neighbouring runs must not share members.
            member_seed = int(content_hash("ensemble", seed, number)[:7], 16)
            counts = _train_member(config, start, train, choice, seen, member, member, member_seed)
    if is_main():
        _write_metrics(config, start, train, validation, folder, seed, gold, counts)
    return target


def _for_the_choice(validation: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """Those of a third of the prompts, to choose weights on, and the others, to measure the chosen ones on.

    Measured on what it was chosen by, a PM that knows nothing would pass for one that does too often.
    """
    names = sorted({row.prompt_id for row in validation}, key=lambda name: content_hash("pm.keep", name))
    chosen = set(names[: round(len(names) / 3)])
    if not chosen:
        raise UserError(
            f"pm.keep=best chooses on a third of the validation prompts, and there are only {len(names)}; raise "
            "data.validation_fraction, or give pm.keep=last"
        )
    parts: dict[bool, list[Preference]] = {True: [], False: []}
    for row in validation:
        parts[row.prompt_id in chosen].append(row)
    return parts[True], parts[False]


def _write_metrics(
    config: PMConfig,
    start: ModelConfig,
    train: Sequence[Preference],
    validation: Sequence[Preference],
    folder: Path,
    seed: int,
    gold: str | None,
    counts: Mapping[str, int],
) -> None:
    target = folder / "preference_model"
    if config.ensemble > 1:
        write_json(target / ENSEMBLE, {"members": [f"member-{number}" for number in range(config.ensemble)]})
    metrics: dict[str, Any] = {
        "seed": seed,
        "feedback": train[0].feedback,
        "feedback_declared": any(preference.declared for preference in train),
        "labeler": train[0].labeler,
        "base": start.name,
        "ensemble": config.ensemble,
        **counts,
    }
    if validation:
        metrics |= preference_metrics(load_scorer(pm_config(start, target)), validation, gold)
    else:
        log.warning("pm: there are no validation preferences; the PM is not measured")
    write_json(folder / "pm_metrics.json", metrics)


def _encoded(preferences: Sequence[Preference], tokenizer: Any, config: PMConfig) -> list[dict[str, Any]]:
    """Comparisons that have a side, or a soft label, as token ids."""
    return [
        {
            "prompt_id": preference.prompt_id,
            "prompt_ids": [],
            "chosen_ids": encode_example(tokenizer, preference.examples[0]),
            "rejected_ids": encode_example(tokenizer, preference.examples[1]),
            "p_chosen": label,
        }
        for preference, label in with_targets(preferences, config.soft_labels, "pm")
    ]


def _short(rows: Sequence[dict[str, Any]], config: PMConfig) -> list[dict[str, Any]]:
    return drop_long(rows, lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"])), config.max_length, "pm")


def _train_member(
    config: PMConfig,
    start: ModelConfig,
    train: Sequence[Preference],
    choice: Sequence[Preference],
    seen: Sequence[Preference],
    folder: Path,
    target: Path,
    seed: int,
) -> dict[str, int]:
    """Train one PM into ``target``, with its curve and checkpoints in ``folder``; returns what it was trained on.

    With ``choice`` it is saved as it was when these were likeliest.
    """
    if (target / CALIBRATION).is_file():
        return dict(read_json(target / CALIBRATION)["trained_on"])
    seed_everything(seed)
    key = "pm.model" if config.model else "policy"
    tokenizer = load_tokenizer(start, key)
    separate_pad_token(tokenizer)
    rows = _encoded(train, tokenizer, config)
    kept = _short(rows, config)
    groups = group_comparisons(kept)
    held_out = group_comparisons(_short(_encoded(choice, tokenizer, config), config)) if choice else []
    # Weights that train are float32, whatever the arithmetic: in a shorter float small updates would vanish.
    loaded = replace(start, dtype=Dtype.float32) if config.tuning is Tuning.full else start
    model = load_sequence_scorer(loaded, key, new_head=True, quantized=config.tuning is Tuning.qlora)
    model.config.pad_token_id = tokenizer.pad_token_id
    share = shares_prefix(model, config, [group["sequences"] for group in (*groups, *held_out)])
    # In several processes all rows are as long as the longest.
    join = world_size() == 1 and joinable(model)
    hidden = model.config.get_text_config().hidden_size if join else None

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate_comparisons(examples)
        del batch["prompts"], batch["sequences"]
        return batch | lay_out([example["sequences"] for example in examples], tokenizer.pad_token_id, share, hidden)

    settings = trainer_arguments(config, start, folder, seed, len(groups))
    if held_out:
        settings |= {"eval_strategy": "steps", "eval_steps": settings["save_steps"], "load_best_model_at_end": True}
        settings |= {"metric_for_best_model": "eval_loss", "per_device_eval_batch_size": config.batch_size}
    arguments = RewardConfig(**settings, max_length=None, center_rewards_coefficient=config.center_coefficient)
    trainer = SoftRewardTrainer(
        model=model,
        args=on_one_device(arguments, start),
        train_dataset=Dataset.from_list(groups),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        data_collator=collate,
        **peft_arguments(config, start, model, "SEQ_CLS", ["score"]),
    )
    trainer.margin = config.margin
    # PEFT raises only adapters to float32: a bfloat16 head would round small updates away.
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and ".score." in f".{name}":
            parameter.data = parameter.data.float()
    run_trainer(trainer, folder, "pm")
    counts = {
        "train_pairs": len(kept),
        "train_prompts": len({row["prompt_id"] for row in kept}),
        "dropped_long": len(rows) - len(kept),
        "dropped_ties": len(train) - len(rows),
    }
    if trainer.state.best_model_checkpoint:
        counts["kept_step"] = int(trainer.state.best_model_checkpoint.rpartition("-")[-1])
        log.info(
            "pm: the weights of step %d of %d are kept: negative log-likelihood %.3f on %d validation prompts",
            counts["kept_step"],
            trainer.state.global_step,
            trainer.state.best_metric,
            len(held_out),
        )

    def save() -> None:
        trained = trainer.model
        if config.tuning is not Tuning.full and (start.adapter or is_adapter(start.name)):
            # The adapter alone would miss what was merged into the base before.
            trained = merge(trained)
        save_model(trained, target)
        tokenizer.save_pretrained(target)
        figures = calibration(PreferenceModel(pm_config(start, target)), seen)
        about = {"feedback": train[0].feedback, "labeler": train[0].labeler, "base": start.name, "seed": seed}
        about["feedback_declared"] = any(preference.declared for preference in train)
        write_json(target / CALIBRATION, {**about, **figures, "trained_on": counts})

    save_result(trainer, folder, "pm", save)
    return counts
