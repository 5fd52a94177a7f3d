"""What the methods on TRL's trainers share: arguments, devices, interrupted runs, the training curve."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlaif.attention import plain_attention
from rlaif.config import LoraSettings, ModelConfig, TrainerSettings, Tuning
from rlaif.lora import lean
from rlaif.methods.divergence import check_figures, check_weights
from rlaif.methods.trackers import TensorBoardBeside, chosen
from rlaif.models import autocasts, check_vocabulary, load_causal_lm, lora_config, pick_device
from rlaif.prefix import shareable, split_prefix
from rlaif.processes import is_main, spreads_weights, wait_for_all, world_size
from rlaif.progress import keep_lines, progress
from rlaif.records import Preference, UserError, read_json, write_json
from rlaif.sharding import gather_weights

log = logging.getLogger("rlaif")

# Completions in one training example of a preference method.
_GROUP = 16
# What a pass through the model costs beside its tokens, in tokens: Python and kernels that wait for each other.
_PASS_CPU, _PASS_GPU = 16, 2048


def load_start(start: ModelConfig, tuning: Tuning) -> Any:
    """The causal language model that training starts from, with the weights that the tuning needs."""
    return load_causal_lm(start, trainable=tuning is Tuning.full, quantized=tuning is Tuning.qlora, merged=True)


def trainer_arguments(
    config: TrainerSettings, start: ModelConfig, folder: Path, seed: int, examples: int
) -> dict[str, Any]:
    """Arguments that every TRL configuration takes."""
    device = pick_device(start.device)
    per_step = config.batch_size * config.gradient_accumulation_steps * world_size()
    steps = math.ceil(examples / per_step) * config.epochs
    total = config.max_steps if config.max_steps > 0 else math.ceil(steps)
    return {
        "output_dir": str(folder / "checkpoints"),
        "learning_rate": config.rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "warmup_steps": round(config.warmup_ratio * total),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": autocasts(start, config.tuning),
        "report_to": chosen(config.report_to) or "none",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        # Else a loss that is not finite would be logged as the mean of those before it.
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": max(total // 5, 1),
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": device.type == "cpu",
    }


def on_one_device(arguments: Any, start: ModelConfig) -> Any:
    """Training arguments for the device of ``policy.device``, unless a launcher gave each process its own.

    A single process that sees several GPUs would otherwise get ``nn.DataParallel``, which splits tensors that belong
    together and runs no loss but the model's own.
    """
    if world_size() > 1:
        return arguments
    device = pick_device(start.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if arguments.n_gpu > 1 or device.index is not None:
        # Both are read once and kept; transformers has no setting for either.
        arguments._n_gpu = 1
        vars(arguments)["_setup_devices"] = device
    return arguments


def peft_arguments(
    config: TrainerSettings, start: ModelConfig, model: Any, task: str, keep: list[str] | None = None
) -> dict[str, Any]:
    """``peft_config`` for LoRA, nothing for all weights."""
    if config.tuning is Tuning.full:
        return {}
    settings: LoraSettings = config.lora
    return {"peft_config": lora_config(settings, model, task, keep, start.revision)}


def with_targets(preferences: Sequence[Preference], soft: bool, what: str) -> list[tuple[Preference, float]]:
    """Each preference with the probability of ``chosen`` that it trains towards: its soft label, or the hard choice.

    A tie has no hard label: such preferences are left out, and a line says how many.

    Raises:
        UserError: if none is left.
    """
    if soft:
        return [(preference, preference.p_chosen) for preference in preferences]
    kept = [(preference, float(preference.p_chosen > 0.5)) for preference in preferences if preference.p_chosen != 0.5]
    if len(kept) < len(preferences):
        ties = f"{len(preferences) - len(kept)} of {len(preferences)} preferences are ties (p_chosen is 0.5)"
        if not kept:
            raise UserError(
                f"{what}.soft_labels=false: {ties}, which have no hard label, so there is nothing to train on"
            )
        log.warning("%s: %s, which have no hard label and are left out", what, ties)
    return kept


def drop_long(
    rows: Sequence[dict[str, Any]], length: Callable[[dict[str, Any]], int], limit: int, what: str
) -> list[dict[str, Any]]:
    """Rows of at most ``limit`` tokens; says how many were dropped.

    Raises:
        UserError: if none is left.
    """
    kept = [row for row in rows if length(row) <= limit]
    if len(kept) < len(rows):
        log.warning(
            "%s: %d of %d examples exceed max_length=%d and are dropped",
            what,
            len(rows) - len(kept),
            len(rows),
            limit,
        )
    if not kept:
        raise UserError(f"{what}: all {len(rows)} training examples are longer than max_length={limit} tokens")
    return kept


def group_comparisons(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All comparisons of a prompt as one training example, in which each completion stands once.

    Ouyang et al. (2022), section 3.5: K completions then cost K forward passes instead of K (K - 1), and no
    completion is seen several times within an epoch. Prompts with many completions make several examples.

    Args:
        rows: pairs with ``prompt_id``, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``p_chosen``.

    Returns:
        Examples with ``prompt_ids``, ``sequences`` (the distinct completions) and, for every pair, places in
        ``sequences`` as ``chosen`` and ``rejected`` beside its ``p_chosen``.
    """
    open_groups: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for row in rows:
        key = (row["prompt_id"], tuple(row["prompt_ids"]))
        group = open_groups.get(key)
        pair = [row["chosen_ids"], row["rejected_ids"]]
        if group is None or len(group["sequences"]) + sum(new not in group["sequences"] for new in pair) > _GROUP:
            group = {"prompt_ids": row["prompt_ids"], "sequences": [], "chosen": [], "rejected": [], "p_chosen": []}
            open_groups[key] = group
            groups.append(group)
        for side in ("chosen", "rejected"):
            sequence = row[f"{side}_ids"]
            if sequence not in group["sequences"]:
                group["sequences"].append(sequence)
            group[side].append(group["sequences"].index(sequence))
        group["p_chosen"].append(row["p_chosen"])
    return groups


def collate_comparisons(groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of examples with their pairs as tensors (P,).

    ``chosen`` and ``rejected`` index the batch's sequences; ``weight`` sums to 1, every example counting the same.
    """
    chosen: list[int] = []
    rejected: list[int] = []
    weight: list[float] = []
    offset = 0
    for group in groups:
        count = len(group["p_chosen"])
        chosen += [offset + place for place in group["chosen"]]
        rejected += [offset + place for place in group["rejected"]]
        weight += [1 / (count * len(groups))] * count
        offset += len(group["sequences"])
    return {
        "prompts": [group["prompt_ids"] for group in groups for _ in group["sequences"]],
        "sequences": [sequence for group in groups for sequence in group["sequences"]],
        "chosen": torch.tensor(chosen),
        "rejected": torch.tensor(rejected),
        "p_chosen": torch.tensor([p for group in groups for p in group["p_chosen"]]),
        "weight": torch.tensor(weight),
    }


def shares_prefix(model: Any, config: TrainerSettings, examples: Sequence[Sequence[Sequence[int]]]) -> bool:
    """Whether batches of these examples, each of some rows, read a common beginning apart (:mod:`rlaif.prefix`).

    Several processes must pass through the model equally often, or they wait for each other forever: for them, only if
    all rows that there are begin with the same, and no batch can be a single row.
    """
    # transformers recomputes layers without a cache; FSDP takes weights away between two passes through a layer.
    if config.gradient_checkpointing or spreads_weights() or not shareable(model):
        return False
    if world_size() == 1:
        return True
    return all(len(rows) > 1 for rows in examples) and bool(split_prefix([row for rows in examples for row in rows])[0])


def parts_by_length(lengths: torch.Tensor, prefix: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The rows (B,) of a batch in parts of similar lengths, such that padding each to its longest row costs least.

    A part costs a pass through the model besides, and another over the prefix (L,) that all rows share. With several
    processes there is one part (see above).
    """
    count, device = len(lengths), lengths.device
    if world_size() > 1:
        return [torch.arange(count, device=device)]
    overhead = _PASS_CPU if device.type == "cpu" else _PASS_GPU
    if prefix is not None:
        overhead = 2 * overhead + len(prefix)
    ordered, order = lengths.cpu().sort(stable=True)
    # cost[n]: of the n shortest rows; start[n]: where the last part of them begins.
    cost, start = torch.zeros(count + 1), [0] * (count + 1)
    for end in range(1, count + 1):
        costs = cost[:end] + torch.arange(end, 0, -1) * ordered[end - 1] + overhead
        cost[end], start[end] = costs.min(), int(costs.argmin())
    parts = []
    while count:
        parts.append(order[start[count] : count].to(device))
        count = start[count]
    return parts


# What TRL's online trainers call what PPO's curve has as well.
_NAMES = {
    "reward": "score",
    "kl": "kl_per_token",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "cut_rate",
}


class Finite(TrainerCallback):
    """Stops training at a step whose loss or gradient is not finite, before its line and its checkpoint are written."""

    def __init__(self, method: str) -> None:
        self.method = method

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Look at the step's figures, in every process."""
        decisive: dict[str, float] = {name: logs[name] for name in ("loss", "grad_norm") if name in logs}
        check_figures(self.method, f"step {state.global_step}", decisive)


class Curve(TrainerCallback):
    """Progress with time left, and one line of ``training.jsonl`` per logged step."""

    def __init__(self, file: Path, method: str) -> None:
        self.file, self.method = file, method
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; drop lines that a checkpoint does not know of."""
        keep_lines(self.file, "step", state.global_step)
        self.bar = progress(state.max_steps, self.method, "step", initial=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Append to the curve; a mean over nothing (TRL's score of a step without scores) is left out."""
        if "loss" not in logs:
            return
        line = {"method": self.method, "step": state.global_step}
        numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        line |= {_NAMES.get(key, key): value for key, value in numbers.items() if math.isfinite(value)}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


_MANIFEST = "complete.json"
"""Written into a checkpoint last: the sizes of its files."""


class Complete(TrainerCallback):
    """Says of a checkpoint, which transformers writes in place, that it has been written to its end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """List the files that all processes have written."""
        wait_for_all()
        if is_main():
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _MANIFEST, _sizes(folder))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there in the sizes that they were written with."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: int(steps[path]), reverse=True)
    for path in found:
        try:
            complete = read_json(path / _MANIFEST) == _sizes(path)
        except UserError:
            complete = False
        if complete:
            return path
        log.warning("%s is not complete: going on from an older checkpoint, or from the start", path)
    return None


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _MANIFEST)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def run_trainer(trainer: Any, folder: Path, method: str) -> None:
    """Train from the newest complete checkpoint, if an interrupted run left one."""
    from transformers.integrations import TensorBoardCallback
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    check_vocabulary(trainer.model, trainer.processing_class)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.pop_callback(TensorBoardCallback) is not None:
        # transformers' own would write into the checkpoints' folder, which goes in the end.
        trainer.add_callback(TensorBoardBeside(folder))
    trainer.add_callback(Finite(method))
    if is_main():
        trainer.add_callback(Curve(folder / "training.jsonl", method))
    trainer.add_callback(Complete())
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is not None:
        log.info("%s: going on from %s", method, newest.name)
    lean(trainer.model)
    with plain_attention(trainer.model):
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def save_result(trainer: Any, folder: Path, method: str, save: Callable[[], None]) -> None:
    """Save what was trained, in one process, and remove what only an interrupted run needs.

    Raises:
        UserError: if training diverged.
    """
    gather_weights(trainer.model)
    wait_for_all()
    check_weights(method, trainer.model)
    if is_main():
        save()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    wait_for_all()
