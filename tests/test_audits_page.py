"""The page of audits says what its data says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "publish_audits.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("publish_audits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def estimate(key: str, value: float, half: float) -> dict[str, float]:
    return {key: value, f"{key}_n": 40, f"{key}_low": value - half, f"{key}_high": value + half}


def audit(**more: Any) -> dict[str, Any]:
    return {
        "constitution": "harmless",
        "n_comparisons": 40,
        "n_verdicts": 80,
        "uncovered": 1,
        "unlisted": 2,
        "failed": 3,
        "kappa": None,
        "option_mass_mean": 0.284,
        "ece": 0.081,
        "verdict": "DO NOT TRAIN ON THESE LABELS: x.",
        **estimate("agreement", 0.5, 0.148),
        **estimate("longer_wins", 0.25, 0.1),
        **more,
    }


def test_every_figure_of_a_row_and_what_is_missing(script: ModuleType) -> None:
    biased = audit(**estimate("position_bias", 1.25, 0.5), **estimate("human_ceiling", 0.926, 0.05))
    audits = {
        "llmbar": {"pairwise, few-shot exemplars": biased},
        "hh_harmless_test": {"score 1-9": audit(verdict="Above chance, but not shown to be better than", commit="def")},
    }
    made = {"commit": "abc", "device": "cpu (x86_64)", "versions": {}}
    text = script.page({"pairs": 40, "made": made, "audits": audits})
    assert (
        "| llmbar | harmless | pairwise, few-shot exemplars | 50.0% [35.2%, 64.8%] | 25.0% [15.0%, 35.0%] | – | "
        "+1.25 [+0.75, +1.75] | – | 0.28 | 6 of 80 | 0.08 | no |\n"
    ) in text
    assert "| hh_harmless_test | harmless | score 1-9 |" in text
    assert "| 0.08 | not beyond length |\n" in text
    [rest] = [line for line in text.splitlines() if line.startswith("Not measured yet")]
    assert len(rest.split(";")) == len(script.SETS) * len(script.MODES) - 2
    assert "two rationales first on llmbar" in rest
    assert "at commit abc (score 1-9: def), cpu (x86_64)" in text
    assert "92.6% [87.6%, 97.6%] agree on llmbar" in text


def test_the_page_comes_from_the_tracked_data(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path / "audits.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "audits.md")
    for mode, pairs in (("pairwise", 40), ("listwise", 7)):
        folder = script.folder_of(tmp_path / "runs", "llmbar", mode)
        folder.mkdir(parents=True)
        (folder / "audit.json").write_text(json.dumps(audit(n_comparisons=pairs)))
        made = {"commit": "abc", "device": "cpu", "versions": {"python": "3"}, "wall_s": 1.5, "platform": "p"}
        (folder / "provenance.json").write_text(json.dumps(made))
    found = script.collect(tmp_path / "runs", 40)
    script.publish(found)
    # Of another number of pairs: not this table's.
    assert list(found["audits"]["llmbar"]) == ["pairwise"]
    stored = json.loads((tmp_path / "audits.json").read_text())
    assert stored == found
    assert stored["audits"]["llmbar"]["pairwise"]["wall_s"] == 1.5
    assert (tmp_path / "audits.md").read_text() == script.page(stored)
    script.publish({"pairs": 40, "made": {}, "audits": {}})
    assert json.loads((tmp_path / "audits.json").read_text())["audits"] == {}
