"""Every training method by its name, on the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif.config import (
    CritiqueRevisionConfig,
    DPOConfig,
    GRPOConfig,
    LoraSettings,
    Method,
    ModelConfig,
    PMConfig,
    RLOOConfig,
    SFTConfig,
)
from rlaif.demonstrations import Demonstration
from rlaif.methods.dpo import train_dpo
from rlaif.methods.online import train_online
from rlaif.methods.pm import train_pm
from rlaif.methods.ppo import train_ppo
from rlaif.methods.sft import train_sft
from rlaif.records import Preference
from tests.methods.problem import PROMPTS, VALIDATION, ppo_config, vowels

PAIRS = [
    Preference(f"p{i}", ({"role": "user", "content": f"ab{i}"},), "aei" * (1 + i % 4), "xyz" * (1 + i % 3), "0", "1",
               0.95, "people", "human")
    for i in range(16)
]  # fmt: skip


class Vowels:
    """A reward."""

    def score(self, examples: Any) -> list[float | None]:
        return list(vowels(examples))


METHODS = ["sft", "critique_revision", "pm", "dpo", "ppo", "rloo", "grpo"]


def train(method: str, start: ModelConfig, folder: Path, **changes: Any) -> None:
    """A method on the tiny model."""
    settings: dict[str, Any] = {"lora": LoraSettings(r=2), "batch_size": 8, "max_steps": 1, "report_to": [], **changes}
    short = {"max_new_tokens": 6, "max_length": 128, "generations": 4}
    if method == "ppo":
        own = {"iterations": settings["max_steps"], "linear_decay": False, "report_to": [], **changes}
        own.pop("max_steps", None)
        train_ppo(ppo_config(**own), start, PROMPTS, vowels, folder, 0, VALIDATION)
    elif method == "pm":
        train_pm(PMConfig(**settings), start, PAIRS, [], folder, 0)
    elif method == "dpo":
        train_dpo(DPOConfig(**settings), start, PAIRS, folder, 0)
    elif method in ("rloo", "grpo"):
        kind = RLOOConfig if method == "rloo" else GRPOConfig
        train_online(Method(method), kind(**settings, **short), start, PROMPTS, Vowels(), folder, 0)
    else:
        kind_of = {"sft": SFTConfig, "critique_revision": CritiqueRevisionConfig}[method]
        shown = [Demonstration(pair.prompt, pair.chosen) for pair in PAIRS]
        train_sft(kind_of(**settings), start, shown, folder, 0, method)
