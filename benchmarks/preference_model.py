"""Training a preference model: pairs a second against TRL's stock RewardTrainer, with the same losses.

    python -m benchmarks.preference_model [--quick] [--steps 8] [--repeats 3] [--dtype bfloat16]

The embedded model, LoRA r=16 on all linear layers, hard labels, no centring; every step sees the same pairs.
Once with one pair a prompt, once with all six pairs of four completions, where ours passes each completion through the
model once. Runs alternate; ratios are medians over repeats. ``*_loss_difference`` is the largest over all steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.against_trl import RATE, command_line, compare, losses_of, rows, stock_arguments, stock_losses
from benchmarks.harness import finish

if TYPE_CHECKING:
    from rlaif.config import ModelConfig


def ours(start: ModelConfig, pairs: list[Any], prompts: int, steps: int, folder: Path) -> list[float]:
    """``rlaif.train method=pm``."""
    from rlaif.config import PMConfig
    from rlaif.methods.pm import train_pm

    config = PMConfig(
        learning_rate=RATE, max_steps=steps, batch_size=prompts, warmup_ratio=0.0, center_coefficient=0.0, report_to=[]
    )
    train_pm(config, start, pairs, [], folder, seed=0)
    return losses_of(folder)


def theirs(start: ModelConfig, pairs: list[Any], steps: int, folder: Path) -> list[float]:
    """TRL's trainer as it comes, on a model whose head starts at zero as ours does."""
    from trl import RewardConfig, RewardTrainer

    from rlaif.config import LoraSettings
    from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config, seed_everything
    from rlaif.preference_model import separate_pad_token

    seed_everything(0)
    tokenizer = load_tokenizer(start)
    separate_pad_token(tokenizer)
    model = load_sequence_scorer(start, new_head=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = RewardConfig(**stock_arguments(folder, steps, len(pairs)), center_rewards_coefficient=None)
    trainer = RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(pairs),
        processing_class=tokenizer,
        peft_config=lora_config(LoraSettings(), model, "SEQ_CLS", ["score"]),
    )
    return stock_losses(trainer)


def main() -> None:
    """Compare and write the result."""
    options = command_line(__doc__)
    ratios, details = compare(ours, theirs, options)
    finish("preference_model", ratios, details, ["trl", "torch", "transformers", "peft"], options.quick, options.dtype)


if __name__ == "__main__":
    main()
