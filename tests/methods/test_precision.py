"""Weights that train are float32 in every method, whatever ``policy.dtype``, which is that of the arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from transformers.models.llama.modeling_llama import LlamaMLP

from rlaif.config import Dtype, Method, TrainConfig, Tuning
from rlaif.methods.ppo import PPOTrainer
from rlaif.models import load_causal_lm
from rlaif.records import UserError
from rlaif.train import check
from tests.methods.every_method import METHODS, train
from tests.methods.problem import TINY

Weights = dict[str, torch.Tensor]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The weights that train, at the start and at the end of each training."""
    found: list[Weights] = []

    def watched(train: Callable[..., Any], model: Callable[[Any], Any], extra: Callable[[Any], Any]) -> Any:
        def run(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            def note() -> None:
                named = {name: value for name, value in model(trainer).named_parameters() if value.requires_grad}
                named |= {f"value {place}": value for place, value in enumerate(extra(trainer))}
                found.append({name: value.detach().clone() for name, value in named.items()})

            note()
            result = train(trainer, *args, **kwargs)
            note()
            return result

        return run

    monkeypatch.setattr(Trainer, "train", watched(Trainer.train, lambda t: t.model, lambda t: []))
    values = lambda t: t.value_parameters  # noqa: E731
    monkeypatch.setattr(PPOTrainer, "train", watched(PPOTrainer.train, lambda t: t.policy.model, values))
    return found


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_train_are_float32(
    method: str, tuning: Tuning, seen: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: set[torch.dtype] = set()
    forward = LlamaMLP.forward

    def noted(layer: Any, states: torch.Tensor) -> torch.Tensor:
        result = forward(layer, states)
        computed.add(result.dtype)
        return result

    monkeypatch.setattr(LlamaMLP, "forward", noted)
    start = dataclasses.replace(TINY, dtype=Dtype.bfloat16)
    train(method, start, tmp_path, tuning=tuning)
    assert {value.dtype for weights in seen for value in weights.values()} == {torch.float32}
    assert torch.bfloat16 in computed


def moved(before: Weights, after: Weights) -> float:
    """Share of weights that are not what they were."""
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    return changed / sum(value.numel() for value in before.values())


@pytest.mark.parametrize(("method", "steps"), [("dpo", 4), ("ppo", 2)])
def test_small_steps_move_the_weights(method: str, steps: int, seen: list[Weights], tmp_path: Path) -> None:
    """In bfloat16 most weights are further than 1e-6 from the next number."""
    start = dataclasses.replace(TINY, dtype=Dtype.bfloat16)
    train(method, start, tmp_path, tuning=Tuning.full, learning_rate=1e-6, max_steps=steps)
    assert moved(*seen) > 0.5


def test_a_trained_start_is_merged_and_not_rounded(tmp_path: Path) -> None:
    """What trains further starts from all that an adapter had learned."""
    train("sft", TINY, tmp_path, learning_rate=1e-2)
    start = dataclasses.replace(TINY, adapter=str(tmp_path / "policy"))
    exact = load_causal_lm(start, merged=True).state_dict()
    short = load_causal_lm(dataclasses.replace(start, dtype=Dtype.bfloat16), trainable=True).state_dict()
    assert all(torch.equal(value, exact[name]) for name, value in short.items())


@pytest.mark.parametrize("method", METHODS)
def test_float16_does_not_train_all_weights(method: str) -> None:
    policy = dataclasses.replace(TINY, dtype=Dtype.float16)
    extra = {"constitution": "harmless"} if method == "critique_revision" else {}
    config = TrainConfig(method=Method(method), policy=policy, **extra)
    check(config)
    getattr(config, method).tuning = Tuning.full
    with pytest.raises(UserError, match=rf"{method}\.tuning=full with policy\.dtype=float16: .*bfloat16 or float32"):
        check(config)
