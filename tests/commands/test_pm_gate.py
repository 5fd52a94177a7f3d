"""A PM that knows nothing guides no policy, unless it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_lines
from test_methods import QUICK

Command = Callable[..., Any]
SETTINGS = [setting for setting in QUICK if not setting.startswith("pm.gate")]


@pytest.fixture(scope="module")
def contradicting(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preferences that say one thing of every other prompt and the opposite of the rest."""
    folder = tmp_path_factory.mktemp("contradicting")
    prompts = [json.loads(line)["prompt"] for line in (inputs / "prompts.jsonl").read_text("utf-8").splitlines()]
    for split, some in (("train", prompts[:24]), ("validation", prompts[24:])):
        sides = [{"chosen": "area", "rejected": "rhythm"}, {"chosen": "rhythm", "rejected": "area"}]
        rows = [{"prompt": prompt, **sides[number % 2]} for number, prompt in enumerate(some)]
        write_lines(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def train(run_command: Command, inputs: Path, contradicting: Path, tmp_path: Path) -> Command:
    def run(*overrides: str, expect: int = 0) -> Any:
        data = [f"prompts={inputs}/prompts.jsonl", f"preferences={contradicting}", "feedback=human"]
        return run_command("train", *SETTINGS, *data, f"output_dir={tmp_path / 'out'}", *overrides, expect=expect)

    return run


def test_a_pm_that_learned_nothing_stops_what_it_would_guide(train: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = train("method=best_of_n", expect=2).stderr
    *_, line = stopped.strip().splitlines()
    assert line.startswith("error: pm.gate=stop: best_of_n would be guided by the preference model in ")
    assert "on 16 held-out prompts" in line
    assert line.endswith("pm.gate=warn goes on with this preference model")
    assert sorted(path.name for path in out.iterdir()) == ["pm"]
    # The PM stays, and the gate is no reason to train it again.
    weights = next((out / "pm" / "preference_model").glob("*.safetensors"))
    before = weights.stat().st_mtime_ns
    went_on = train("method=best_of_n", "pm.gate=warn").stderr
    assert "pm: up to date, skipped" in went_on
    assert weights.stat().st_mtime_ns == before
    assert "WARNING: the preference model in" in went_on.strip().splitlines()[-1]
    found = json.loads((out / "evaluation" / "metrics.json").read_text("utf-8"))
    measured = json.loads((out / "pm" / "pm_metrics.json").read_text("utf-8"))
    assert found["guide_gate"] == "failed"
    assert {key: found[f"guide_{key}"] for key in ("accuracy", "accuracy_n", "accuracy_low")} == {
        key: measured[key] for key in ("accuracy", "accuracy_n", "accuracy_low")
    }


def test_a_given_pm_is_held_to_its_metrics_before_anything_is_trained(train: Command, tmp_path: Path) -> None:
    train("method=pm")
    given = tmp_path / "given"
    (tmp_path / "out" / "pm").rename(given)
    overrides = ["method=best_of_n", f"preference_model={given}/preference_model"]
    stopped = train(*overrides, "sft_first=true", expect=2).stderr
    assert "error: pm.gate=stop: best_of_n would be guided by" in stopped
    assert not list((tmp_path / "out").glob("sft"))
    (given / "pm_metrics.json").unlink()
    went_on = train(*overrides).stderr
    assert "not measured (no pm_metrics.json" in went_on
    assert json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text("utf-8"))["guide_gate"] == "unknown"


@pytest.mark.slow
def test_a_stopped_arm_keeps_no_other_from_being_made(
    run_command: Command, contradicting: Path, tmp_path: Path
) -> None:
    run = [
        *("experiment=smoke", f"output_dir={tmp_path / 'run'}", "pm.gate=stop", "pm.max_steps=2", "dpo.max_steps=2"),
        *("~arms.rlaif_ppo", "~arms.rlhf_ppo", "+arms.bon={method: best_of_n, feedback: human}"),
        *(f"human_preferences={contradicting}", "best_of_n.n=2", "eval.max_prompts=4"),
    ]
    stopped = run_command("run", *run, expect=2).stderr.strip().splitlines()[-1]
    assert stopped.startswith("error: arm bon: pm.gate=stop: best_of_n would be guided by ")
    report = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "dpo" in report
    assert "not shown to be above chance on held-out preferences: bon/pm" in report
    assert "1 job failed" in report
    run_command("run", *run, "pm.gate=warn")
    report = (tmp_path / "run" / "report.md").read_text("utf-8")
    assert "1 job failed" not in report
    assert "bon, seed 0, was guided by a preference model that did not pass its gate" in report
