"""docs/train.md explains every figure of every method's curve, and none that there is not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import (
    DPOConfig,
    GRPOConfig,
    LoraSettings,
    Method,
    PMConfig,
    PPOConfig,
    RLOOConfig,
    SFTConfig,
)
from rlaif.demonstrations import Demonstration
from rlaif.methods.dpo import train_dpo
from rlaif.methods.online import train_online
from rlaif.methods.pm import train_pm
from rlaif.methods.ppo import train_ppo
from rlaif.methods.sft import train_sft
from rlaif.records import Example, Preference
from tests.methods.problem import PROMPTS, TINY

PREFERENCES = [Preference(p.prompt_id, p.messages, "aa", "zz", "0", "1", 1.0, "people", "human") for p in PROMPTS]
STEP: dict[str, Any] = {"max_steps": 1, "batch_size": 4, "lora": LoraSettings(r=2), "report_to": []}
ONLINE: dict[str, Any] = STEP | {"generations": 2, "max_new_tokens": 4}


class Lengths:
    """A reward."""

    def score(self, examples: Sequence[Example]) -> list[float | None]:
        return [float(len(example.completion)) for example in examples]


def ppo(folder: Path) -> None:
    config = PPOConfig(
        iterations=1, rollouts=4, minibatch_size=4, max_new_tokens=4, eval_every=1, lora=LoraSettings(r=2), report_to=[]
    )
    train_ppo(config, TINY, PROMPTS, lambda examples: [1.0] * len(examples), folder, 0, PROMPTS)


OTHERS: dict[str, Callable[[Path], Any]] = {
    "sft": lambda folder: train_sft(
        SFTConfig(**STEP), TINY, [Demonstration(p.messages, "yes") for p in PROMPTS], folder, 0
    ),
    "pm": lambda folder: train_pm(PMConfig(**STEP), TINY, PREFERENCES, [], folder, 0),
    "dpo": lambda folder: train_dpo(DPOConfig(**STEP), TINY, PREFERENCES, folder, 0),
    "rloo": lambda folder: train_online(Method.rloo, RLOOConfig(**ONLINE), TINY, PROMPTS, Lengths(), folder, 0),
    "grpo": lambda folder: train_online(Method.grpo, GRPOConfig(**ONLINE), TINY, PROMPTS, Lengths(), folder, 0),
}


def logged(folder: Path) -> set[str]:
    lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
    return {key for line in lines for key in json.loads(line)} - {"method", "iteration", "step"}


def explained(heading: str) -> set[str]:
    """What stands in the first column of the first table below a heading."""
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
    table = text.split(f"### {heading}\n", 1)[1].split("| curve |", 1)[1].split("\n\n", 1)[0]
    return {key for row in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_every_curve_of_ppo_is_explained(tmp_path: Path) -> None:
    ppo(tmp_path)
    assert explained("Reading the curves") == logged(tmp_path)


@pytest.mark.slow
def test_every_curve_of_the_other_methods_is_explained(tmp_path: Path, subtests: pytest.Subtests) -> None:
    found: set[str] = set()
    for name, train in OTHERS.items():
        with subtests.test(name):
            (tmp_path / name).mkdir()
            train(tmp_path / name)
            found |= logged(tmp_path / name)
            assert logged(tmp_path / name) <= explained("The curves of the other methods")
    assert explained("The curves of the other methods") <= found
