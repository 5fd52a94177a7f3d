"""What a PM's recorded figures say of it, and what is made of that."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import Gate, PMConfig
from rlaif.evaluation.pm_gate import PMGateError, examine_pm, hold_to_gate, prompts_needed
from rlaif.evaluation.statistics import Estimate


def figures(name: str, value: float, n: int, low: float | None, high: float | None) -> dict[str, Any]:
    return {name: value, f"{name}_n": n, f"{name}_low": low, f"{name}_high": high}


def model(folder: Path, *estimates: dict[str, Any]) -> Path:
    """A PM's folder with its metrics beside it, as training leaves them."""
    (folder / "preference_model").mkdir(parents=True)
    merged = {key: value for estimate in estimates for key, value in estimate.items()}
    (folder / "pm_metrics.json").write_text(json.dumps(merged), encoding="utf-8")
    return folder / "preference_model"


@pytest.mark.parametrize(
    ("accuracy", "minimum", "passed", "said"),
    [
        ((0.68, 84, 0.62, 0.74), None, True, "accuracy 68.0% [62.0%, 74.0%] on 84 held-out prompts, above chance"),
        ((0.51, 35, 0.42, 0.6), None, False, "not shown to be above chance (50%)"),
        ((0.6, 84, 0.5, 0.7), None, False, "not shown to be above chance (50%)"),
        ((0.3, 84, 0.2, 0.4), None, False, "less often right than a coin"),
        ((0.62, 84, 0.55, 0.69), 0.65, False, "below pm.min_accuracy=0.65"),
        ((0.66, 84, 0.59, 0.73), 0.65, True, "above chance"),
        # High enough, but by luck for all that is known.
        ((0.7, 9, 0.4, 0.9), 0.65, False, "not shown to be above chance"),
        ((1.0, 1, None, None), None, False, "accuracy 100.0% [no interval] on 1 held-out prompt, not shown"),
    ],
)
def test_above_chance_is_an_interval_that_ends_above_one_half(
    tmp_path: Path, accuracy: tuple[Any, ...], minimum: float | None, passed: bool, said: str
) -> None:
    folder = model(tmp_path, figures("accuracy", *accuracy))
    found = examine_pm(folder, PMConfig(min_accuracy=minimum))
    assert (found.passed, said in found.text) == (passed, True), found.text


def test_how_many_prompts_would_do() -> None:
    # The interval reaches 0.2 below 0.6; to reach 0.1 it takes four times the prompts.
    assert prompts_needed(Estimate(0.6, 35, 0.4, 0.8)) == 140
    assert prompts_needed(Estimate(0.5, 35, 0.4, 0.6)) is None


def test_a_pm_that_failed_says_how_many_prompts_would_show_it(tmp_path: Path) -> None:
    folder = model(tmp_path, figures("accuracy", 0.6, 35, 0.4, 0.8))
    with pytest.raises(PMGateError) as stopped:
        hold_to_gate(folder, PMConfig(), "ppo")
    said = str(stopped.value)
    assert said.startswith(f"pm.gate=stop: ppo would be guided by the preference model in {folder}: accuracy 60.0% [")
    assert "about 140 validation prompts (data.validation_fraction)" in said
    assert said.endswith("pm.gate=warn goes on with this preference model")
    assert "\n" not in said


def test_a_warning_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model(tmp_path, figures("accuracy", 0.51, 35, 0.42, 0.6))
    with caplog.at_level(logging.INFO, "rlaif"):
        found = hold_to_gate(folder, PMConfig(gate=Gate.warn), "ppo")
    assert "WARNING: the preference model" in caplog.text
    assert found.flat() == {"guide_gate": "failed", **figures("guide_accuracy", 0.51, 35, 0.42, 0.6)}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"accuracy": "high"}', '{"accuracy": NaN, "accuracy_n": 9}'])
def test_a_pm_of_which_nothing_is_known_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str | None
) -> None:
    (tmp_path / "preference_model").mkdir()
    if content is not None:
        (tmp_path / "pm_metrics.json").write_text(content, encoding="utf-8")
    with caplog.at_level(logging.INFO, "rlaif"):
        found = hold_to_gate(tmp_path / "preference_model", PMConfig(), "ppo")
    assert (found.passed, found.flat()) == (None, {"guide_gate": "unknown"})
    assert "not measured" in caplog.text
    # Who asks for an accuracy has to have it measured.
    with pytest.raises(PMGateError, match="not measured"):
        hold_to_gate(tmp_path / "preference_model", PMConfig(min_accuracy=0.6), "ppo")


def test_length_alone_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = figures("accuracy", 0.68, 84, 0.62, 0.74)
    for name, gain, warns in (
        ("same", figures("gain_over_longer", 0.01, 84, -0.04, 0.06), True),
        ("more", figures("gain_over_longer", 0.1, 84, 0.04, 0.16), False),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "rlaif"):
            hold_to_gate(model(tmp_path / name, good, gain), PMConfig(), "ppo")
        assert ("rule that the longer completion wins" in caplog.text) == warns
