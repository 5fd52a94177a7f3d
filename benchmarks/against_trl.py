"""What the benchmarks of the supervised methods share: made-up preferences, and timing a trainer by its own loop."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import parser, say, spread

if TYPE_CHECKING:
    from rlaif.config import ModelConfig

RATE = 1e-4
"""Learning rate of both."""


def preferences(completions: int, prompts: int) -> list[Any]:
    """All pairs of so many generated completions of each of some shipped prompts; the earlier one is better."""
    from rlaif.records import Preference, find_prompts, read_prompts

    found = read_prompts(find_prompts("everyday"))[:prompts]
    words = " ".join(prompt.text for prompt in found).split()
    rng = random.Random(0)
    result = []
    for prompt in found:
        texts = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(completions)]
        for one in range(completions):
            for other in range(one + 1, completions):
                result.append(
                    Preference(
                        prompt.prompt_id, prompt.messages, texts[one], texts[other], f"c{one}", f"c{other}", 1.0,
                        "generated", "simulated_human",
                    )
                )  # fmt: skip
    return result


def rows(pairs: list[Any]) -> Any:
    """The pairs as TRL's trainers take them."""
    from datasets import Dataset

    names = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{name: pair.to_row()[name] for name in names} for pair in pairs])


def losses_of(folder: Path) -> list[float]:
    """The loss of each step of a method of this project."""
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def stock_arguments(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Arguments of TRL's trainers that ours are run with too; up to 8 pairs at a time: 48 take more than 24 GB."""
    import torch

    at_once = max(size for size in range(1, 9) if batch % size == 0)
    return {
        "output_dir": str(folder),
        "learning_rate": RATE,
        "max_steps": steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": batch // at_once,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "max_length": None,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }


def stock_lm(start: ModelConfig) -> Any:
    """The language model as transformers loads it, without what this project changes about it."""
    from transformers import AutoModelForCausalLM

    from rlaif.models import pick_device, pick_dtype, resolve_model

    device = pick_device(start.device)
    model = AutoModelForCausalLM.from_pretrained(resolve_model(start.name), dtype=pick_dtype(start.dtype, device))
    return model.to(device).eval()


def stock_losses(trainer: Any) -> list[float]:
    """Train with a trainer of TRL's; the loss of each step."""
    quiet(trainer).train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def quiet(trainer: Any) -> Any:
    """A trainer that prints nothing."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


@contextlib.contextmanager
def timed_training() -> Iterator[list[float]]:
    """Seconds of every ``Trainer.train`` in the block; loading, tokenising and saving are left out."""
    from transformers import Trainer

    seconds: list[float] = []
    original = Trainer.train

    def train(self: Any, *arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = original(self, *arguments, **named)
        seconds.append(time.perf_counter() - started)
        return result

    Trainer.train = train  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Trainer.train = original  # type: ignore[method-assign]


def command_line(description: str | None) -> argparse.Namespace:
    """What the command line says."""
    result = parser(description)
    result.add_argument("--steps", type=int, default=8, help="optimiser steps of each run")
    result.add_argument("--repeats", type=int, default=3, help="runs of each, taking turns")
    result.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the weights, in both")
    return result.parse_args()


def compare(
    ours: Callable[[ModelConfig, list[Any], int, int, Path], list[float]],
    theirs: Callable[[ModelConfig, list[Any], int, Path], list[float]],
    options: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ratios and details: alternating runs on single pairs, and on all pairs of four completions.

    Args:
        ours: trains a model on pairs of so many prompts, so many steps, in a folder; returns the loss of each step. A
            step is all pairs, so that losses are comparable.
        theirs: the same with TRL's stock trainer.
        options: what :func:`command_line` found.
    """
    from rlaif.config import Dtype, ModelConfig

    start = ModelConfig(name="embedded", dtype=Dtype(options.dtype))
    prompts, steps, repeats = (2, 2, 1) if options.quick else (8, options.steps, options.repeats)
    ratios: dict[str, Any] = {}
    details: dict[str, Any] = {"steps": steps, "prompts_per_step": prompts, "repeats": repeats}
    details["dtype"] = options.dtype
    for name, completions in (("pairs", 2), ("groups_of_4", 4)):
        pairs = preferences(completions, prompts)
        rates: dict[str, list[float]] = {"rlaif": [], "trl": []}
        losses: dict[str, list[float]] = {}
        for _ in range(repeats):
            for who in ("rlaif", "trl"):
                with tempfile.TemporaryDirectory() as place, timed_training() as seconds:
                    folder = Path(place)
                    losses[who] = (
                        ours(start, pairs, prompts, steps, folder)
                        if who == "rlaif"
                        else theirs(start, pairs, steps, folder)
                    )
                rates[who].append(len(pairs) * steps / seconds[0])
                say(f"{name}: {rates[who][-1]:.2f} pairs/s by {who}")
        difference = max(abs(a - b) for a, b in zip(losses["rlaif"], losses["trl"], strict=True))
        each = [a / b for a, b in zip(rates["rlaif"], rates["trl"], strict=True)]
        ratios |= {f"{name}_per_s_vs_trl": round(statistics.median(each), 3), f"{name}_loss_difference": difference}
        details[name] = {"pairs": len(pairs), "losses": losses, **{who: spread(found) for who, found in rates.items()}}
    return ratios, details
