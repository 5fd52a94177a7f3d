"""The labeler as a reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import LabelerConfig, LabelerType, LabelingConfig, Principles, ScriptedConfig
from rlaif.engines.base import OptionMass, OptionRequest
from rlaif.engines.scripted import ScriptedEngine
from rlaif.gold import gold_score
from rlaif.records import UserError
from rlaif.rewards import LabelerReward, known_scores

USER = ({"role": "user", "content": "q"},)
TEXTS = ["aeiou", "rhythm", "banana", ""]
SCRIPTED = LabelerConfig(type=LabelerType.scripted, scripted=ScriptedConfig(utility="letters", sharpness=4.0))


def scores(folder: Path, labeler: LabelerConfig = SCRIPTED, **labeling: Any) -> list[float | None]:
    folder.mkdir(exist_ok=True)
    source = LabelerReward(labeler, LabelingConfig(**labeling), "helpful", seed=0)
    with source.open(folder) as reward:
        return list(reward.score([(USER, text) for text in TEXTS]))


def test_the_score_is_the_logit_of_the_verdicts(tmp_path: Path) -> None:
    """The scripted labeler's logit is 4 x utility under every principle, so their weighted mean is as well."""
    expected = [4 * gold_score("letters", text) for text in TEXTS]
    assert scores(tmp_path) == pytest.approx(expected, abs=1e-6)
    assert scores(tmp_path, temperature=2.0) == pytest.approx([value / 2 for value in expected], abs=1e-6)


def test_a_sampled_principle_counts_alone(tmp_path: Path) -> None:
    """Each completion is asked under one principle: its verdict is the score, whatever the others would weigh."""
    expected = [4 * gold_score("letters", text) for text in TEXTS]
    assert scores(tmp_path, principles=Principles.sample) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("key", ["labeler.audit", "labeler.min_agreement", "labeling.calibrate"])
def test_a_labeler_that_was_to_be_measured_first_is_refused(key: str) -> None:
    group, name = key.split(".")
    labeler, labeling = replace(SCRIPTED), LabelingConfig()
    setattr(labeler if group == "labeler" else labeling, name, "x")
    with pytest.raises(UserError, match=rf"{key}=x: reward=labeler .* run rlaif.audit first"):
        LabelerReward(labeler, labeling, "helpful", 0).check()


def test_verdicts_are_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scores(tmp_path)

    def refuse(engine: ScriptedEngine, requests: Iterable[OptionRequest]) -> Iterator[tuple[int, OptionMass]]:
        assert not list(requests)
        return iter(())

    monkeypatch.setattr(ScriptedEngine, "score_options", refuse)
    assert scores(tmp_path) == first


def test_no_verdict_is_no_score(tmp_path: Path) -> None:
    faulty = replace(SCRIPTED, scripted=replace(SCRIPTED.scripted, fault_rate=0.05))
    found = scores(tmp_path, faulty)
    assert None in found
    assert any(value is not None for value in found)
    broken = replace(SCRIPTED, scripted=replace(SCRIPTED.scripted, fault_rate=1.0))
    with pytest.raises(UserError, match="no usable verdict on 4 completions; first: scripted_fault"):
        scores(tmp_path / "broken", broken)


def test_ppo_takes_a_missing_score_as_average() -> None:
    assert known_scores([1.0, None, 3.0]) == [1.0, 2.0, 3.0]


def test_what_is_missing_is_said_at_once() -> None:
    with pytest.raises(UserError, match="reward=labeler needs a labeler"):
        LabelerReward(LabelerConfig(), LabelingConfig(), "helpful", 0).check()
    with pytest.raises(UserError, match="constitution is not set"):
        LabelerReward(SCRIPTED, LabelingConfig(), None, 0).check()
