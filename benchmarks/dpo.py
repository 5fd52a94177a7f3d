"""DPO: pairs a second against TRL's stock DPOTrainer, with the same losses.

    python -m benchmarks.dpo [--quick] [--steps 8] [--repeats 3] [--dtype bfloat16]

The embedded model, LoRA r=16 on all linear layers, hard labels; every step sees the same pairs.
Once with one pair a prompt, once with all six pairs of four completions, where ours passes each completion through the
model once. Runs alternate; ratios are medians over repeats. ``*_loss_difference`` is the largest over all steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.against_trl import RATE, command_line, compare, losses_of, rows, stock_arguments, stock_lm, stock_losses
from benchmarks.harness import finish

if TYPE_CHECKING:
    from rlaif.config import ModelConfig


def ours(start: ModelConfig, pairs: list[Any], prompts: int, steps: int, folder: Path) -> list[float]:
    """``rlaif.train method=dpo``."""
    from rlaif.config import DPOConfig
    from rlaif.methods.dpo import train_dpo

    config = DPOConfig(learning_rate=RATE, max_steps=steps, batch_size=prompts, warmup_ratio=0.0, report_to=[])
    train_dpo(config, start, pairs, folder, seed=0)
    return losses_of(folder)


def theirs(start: ModelConfig, pairs: list[Any], steps: int, folder: Path) -> list[float]:
    """TRL's trainer as it comes."""
    from trl import DPOConfig, DPOTrainer

    from rlaif.config import LoraSettings
    from rlaif.models import load_tokenizer, lora_config, seed_everything

    seed_everything(0)
    model = stock_lm(start)
    arguments = DPOConfig(**stock_arguments(folder, steps, len(pairs)), beta=0.1)
    trainer = DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(pairs),
        processing_class=load_tokenizer(start),
        peft_config=lora_config(LoraSettings(), model, "CAUSAL_LM", None),
    )
    return stock_losses(trainer)


def main() -> None:
    """Compare and write the result."""
    options = command_line(__doc__)
    ratios, details = compare(ours, theirs, options)
    finish("dpo", ratios, details, ["trl", "torch", "transformers", "peft"], options.quick, options.dtype)


if __name__ == "__main__":
    main()
