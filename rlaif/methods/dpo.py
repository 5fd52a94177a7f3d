"""DPO with soft labels on TRL's DPOTrainer (Rafailov et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig as TRLDPOConfig
from trl import DPOTrainer

from rlaif.chat import encode_chat, encode_text, turn_end
from rlaif.config import DPOConfig, ModelConfig, Tuning
from rlaif.losses import dpo_margin, token_logps
from rlaif.methods.dpo_losses import Ratios, soft_dpo_loss
from rlaif.methods.supervised import (
    collate_comparisons,
    drop_long,
    group_comparisons,
    load_start,
    on_one_device,
    parts_by_length,
    peft_arguments,
    run_trainer,
    save_result,
    shares_prefix,
    trainer_arguments,
    with_targets,
)
from rlaif.models import load_causal_lm, load_tokenizer, seed_everything
from rlaif.policy import Packed, Policy, completion_logits, pack
from rlaif.records import Preference
from rlaif.trunk import with_trunk


def completion_ids(tokenizer: Any, completion: str, end: int | None) -> list[int]:
    """Token ids of a completion, with the end of its turn unless it was cut (None)."""
    return [*encode_text(tokenizer, completion), *([] if end is None else [end])]


class SoftDPOTrainer(DPOTrainer):
    """DPOTrainer on soft labels, with logits of completion tokens only."""

    settings: DPOConfig
    share: bool

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The soft-label loss over the pairs of the batch."""
        batch, chosen, rejected = inputs["batch"], inputs["chosen"], inputs["rejected"]
        parts = parts_by_length(batch.mask.sum(dim=1), batch.prefix)
        batch = with_trunk(self.accelerator.unwrap_model(model), batch, parts)
        logps = self._summed(model, batch, parts)
        with torch.no_grad():
            if self.ref_model is None:
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    ref_logps = self._summed(self.model, batch, parts)
            else:
                ref_logps = self._summed(self.ref_model, batch, parts)
        pairs = torch.stack([chosen, rejected], dim=1)
        margin = dpo_margin(logps[pairs], ref_logps[pairs], self.beta)
        log_ratios, lengths = logps - ref_logps, batch.completion_mask.sum(dim=1)
        ratios = Ratios(log_ratios[chosen], log_ratios[rejected], lengths[chosen], lengths[rejected])
        settings = self.settings
        losses = soft_dpo_loss(settings.loss_type, ratios, inputs["p_chosen"], settings.beta, settings.label_smoothing)
        loss = (losses * inputs["weight"]).sum()
        metrics = self._metrics["train" if model.training else "eval"]
        metrics["accuracy"].append((margin > 0).float().mean().item())
        metrics["margin"].append(margin.mean().item())
        metrics["chosen_log_ratio"].append(log_ratios[chosen].mean().item())
        return (loss, {"margin": margin}) if return_outputs else loss

    def _summed(self, model: Any, batch: Packed, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        result = batch.completion_mask.new_empty(len(batch))
        for rows in parts:
            part = batch.select(rows)
            logps = token_logps(completion_logits(model, part), part.tokens)
            result[rows] = (logps * part.completion_mask).sum(dim=1)
        return result

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        pad = self.processing_class.pad_token_id
        batch = pack(inputs.pop("prompts"), inputs.pop("sequences"), pad, device, self.share)
        return {"batch": batch, **{name: value.to(device) for name, value in inputs.items()}}


def train_dpo(config: DPOConfig, start: ModelConfig, train: Sequence[Preference], folder: Path, seed: int) -> Path:
    """Train a policy; writes ``policy/`` and ``training.jsonl`` into ``folder``."""
    seed_everything(seed)
    tokenizer = load_tokenizer(start)
    end = turn_end(tokenizer)
    rows = []
    for preference, target in with_targets(train, config.soft_labels, "dpo"):
        ends = [end if ended else None for ended in (preference.chosen_ended, preference.rejected_ended)]
        rows.append(
            {
                "prompt_id": preference.prompt_id,
                "prompt_ids": encode_chat(tokenizer, preference.prompt),
                "chosen_ids": completion_ids(tokenizer, preference.chosen, ends[0]),
                "rejected_ids": completion_ids(tokenizer, preference.rejected, ends[1]),
                "p_chosen": target,
            }
        )
    kept = drop_long(
        rows,
        lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])),
        config.max_length,
        "dpo",
    )
    groups = group_comparisons(kept)
    model = load_start(start, config.tuning)
    reference = load_causal_lm(start, merged=True) if config.tuning is Tuning.full else None
    arguments = TRLDPOConfig(
        **trainer_arguments(config, start, folder, seed, len(groups)), max_length=None, beta=config.beta
    )
    trainer = SoftDPOTrainer(
        model=model,
        ref_model=reference,
        args=on_one_device(arguments, start),
        train_dataset=Dataset.from_list(groups),
        processing_class=tokenizer,
        data_collator=collate_comparisons,
        **peft_arguments(config, start, model, "CAUSAL_LM"),
    )
    trainer.settings = config
    trainer.share = shares_prefix(model, config, [[group["prompt_ids"]] * len(group["sequences"]) for group in groups])
    run_trainer(trainer, folder, "dpo")
    policy = Policy(trainer.model, tokenizer, config.tuning, start)
    save_result(trainer, folder, "dpo", lambda: policy.save(folder / "policy"))
    return folder / "policy"
