"""The problem that PPO's tests solve on the tiny model: prompts, and a score that likes vowels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rlaif.config import LoraSettings, ModelConfig, PPOConfig
from rlaif.records import Example, Prompt

TINY = ModelConfig(name="tiny", device="cpu")
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},)) for i in range(6)]
VALIDATION = [Prompt(f"v{i}", ({"role": "user", "content": "xy" * (i + 1)},)) for i in range(5)]


def vowels(examples: Sequence[Example]) -> list[float]:
    """A quarter point for each."""
    return [sum(letter in "aeiou" for letter in example.completion) / 4 for example in examples]


def ppo_config(**changes: Any) -> PPOConfig:
    """Two small iterations, unless changed. Nearly all completions are cut, which must not outweigh their score."""
    base = PPOConfig(
        missing_eos_penalty=0.0,
        iterations=2,
        rollouts=8,
        minibatch_size=4,
        micro_batch_size=4,
        max_new_tokens=6,
        learning_rate=1e-2,
        lora=LoraSettings(r=4, alpha=8),
    )
    return dataclasses.replace(base, **changes)
