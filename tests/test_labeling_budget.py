"""The budget benchmark measures what it says, on a few prompts."""

import math
import xml.dom.minidom

import pytest

from benchmarks import labeling_budget
from benchmarks.labeling_budget import ONE, apply, calibration, largest, policies, prompts, row
from rlaif.config import ScriptedConfig
from rlaif.labeling.aggregate import Calibration
from rlaif.labeling.store import VerdictStore
from rlaif.reporting.plots import budget_curves


@pytest.fixture
def store(tmp_path):
    with VerdictStore(tmp_path / "s.sqlite") as opened:
        yield opened


def test_every_policy_on_a_labeler_without_noise(store, monkeypatch):
    monkeypatch.setattr(labeling_budget, "LABELER", ScriptedConfig(utility="length", sharpness=0.5))
    lines = prompts(6, 1)
    reference, *others = [policy for policy in policies() if policy.constitution is ONE]
    everything = apply(reference, lines, store, Calibration())
    assert everything.calls == 6 * 15 * 2
    # Where candidates are equally good, either may come first.
    assert everything.agreement == [1.0] * 6
    for policy in others:
        outcome = apply(policy, lines, store, Calibration())
        assert outcome.calls < everything.calls
        assert 0.5 <= min(outcome.agreement) <= max(outcome.agreement) <= 1
        found = row(policy, outcome, everything)
        assert found["saved"] == pytest.approx(1 - outcome.calls / 180, abs=1e-4)


def test_the_planted_bias_is_calibrated(store):
    found = calibration(store, ONE)
    assert found.bias == pytest.approx(1.0, abs=0.5)
    assert math.isfinite(found.temperature)


def test_the_largest_saving_that_agrees_as_well():
    rows = [
        {"saved": 0.0, "difference_low": 0.0},
        {"saved": 0.3, "difference_low": -0.009},
        {"saved": 0.6, "difference_low": -0.011},
    ]
    assert largest(rows)["saved"] == 0.3
    assert largest(rows[::2])["saved"] == 0.0


def test_the_curve_is_drawn():
    svg = budget_curves(
        {"one <&": [(1.0, (0.5, 0.4, 0.6)), (2.0, (0.6, 0.5, 0.7))], "two": [(1.0, (0.5, 0.4, 0.6))]}, "x", "y"
    )
    assert xml.dom.minidom.parseString(svg).documentElement.tagName == "svg"
    assert "one" in svg
