"""Training that diverged is refused in one line, by every method, before anything is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from rlaif.methods.ppo import PPOTrainer
from rlaif.methods.supervised import Curve
from rlaif.records import UserError
from tests.methods.every_method import METHODS, train
from tests.methods.problem import TINY


def strict(file: Path) -> list[dict[str, Any]]:
    """The lines of a curve, without the words that are no JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in {file}")

    if not file.is_file():
        return []
    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_finite_stops_the_run(method: str, tmp_path: Path) -> None:
    advice = rf"{method}: (step|iteration) \d+ gave .*not finite; lower {method}\.learning_rate, or set policy\.dtype"
    with pytest.raises(UserError, match=advice):
        train(method, TINY, tmp_path, learning_rate=1e30, max_steps=5)
    assert not list(tmp_path.glob("policy*")), "published"
    assert not list(tmp_path.glob("preference_model*/*.safetensors")), "published"
    strict(tmp_path / "training.jsonl")


@pytest.mark.parametrize("value", [torch.inf, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_the_last_step_broke_are_not_published(
    method: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No figure of the curve has seen them; those that are finite, but too large, make NaN of every text."""

    def broken(plain: Any, model: Any) -> Any:
        def run(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            result = plain(trainer, *args, **kwargs)
            with torch.no_grad():
                next(each for each in model(trainer).parameters() if each.requires_grad).view(-1)[0] = value
            return result

        return run

    monkeypatch.setattr(Trainer, "train", broken(Trainer.train, lambda trainer: trainer.model))
    monkeypatch.setattr(PPOTrainer, "train", broken(PPOTrainer.train, lambda trainer: trainer.policy.model))
    with pytest.raises(UserError, match=rf"{method}: training left 1 of \d+ tensors .* not finite"):
        train(method, TINY, tmp_path)
    assert not list(tmp_path.glob("policy*"))
    assert not list(tmp_path.glob("preference_model*/*.safetensors"))


def test_a_measurement_of_ppo_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOTrainer, "validate", lambda self: {"validation_objective": float("nan")})
    with pytest.raises(UserError, match="ppo: iteration 0 gave validation_objective that is not finite"):
        train("ppo", TINY, tmp_path, eval_every=1)
    assert strict(tmp_path / "training.jsonl") == []


def test_what_a_step_has_no_figure_for_is_left_out_of_the_curve(tmp_path: Path) -> None:
    """TRL's mean over no completions, say."""
    curve = Curve(tmp_path / "training.jsonl", "rloo")

    class State:
        global_step = 1

    curve.on_log(None, State(), None, {"loss": 0.5, "reward": float("nan"), "reward_std": float("inf")})
    assert strict(tmp_path / "training.jsonl") == [{"method": "rloo", "step": 1, "loss": 0.5}]
