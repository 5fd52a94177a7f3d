"""The labeler as a reward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaif.config import (
    ArmConfig,
    LabelerConfig,
    LabelerType,
    LabelingConfig,
    LabelMode,
    Method,
    Principles,
    Reward,
    RunConfig,
    ScriptedConfig,
    TrainConfig,
)
from rlaif.engines.base import OptionMass, OptionRequest
from rlaif.engines.scripted import ScriptedEngine
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import sigmoid
from rlaif.records import Example, UserError
from rlaif.rewards import LabelerReward, known_scores
from rlaif.run import train_config

USER = ({"role": "user", "content": "q"},)
TEXTS = ["aeiou", "rhythm", "banana", ""]
SCRIPTED = LabelerConfig(type=LabelerType.scripted, scripted=ScriptedConfig(utility="letters", sharpness=4.0))


def scores(
    folder: Path, labeler: LabelerConfig = SCRIPTED, mode: LabelMode = LabelMode.pointwise, **labeling: Any
) -> list[float | None]:
    folder.mkdir(exist_ok=True)
    source = LabelerReward(labeler, LabelingConfig(mode=mode, **labeling), "helpful", seed=0)
    source.check()
    with source.open(folder) as reward:
        return list(reward.score([Example(USER, text) for text in TEXTS]))


def test_the_score_is_the_logit_of_the_verdicts(tmp_path: Path) -> None:
    """The scripted labeler's logit is 4 x utility under every principle, so their weighted mean is as well."""
    expected = [4 * gold_score("letters", text) for text in TEXTS]
    assert scores(tmp_path) == pytest.approx(expected, abs=1e-6)
    assert scores(tmp_path, temperature=2.0) == pytest.approx([value / 2 for value in expected], abs=1e-6)


@pytest.mark.parametrize("principles", list(Principles))
def test_the_expected_score_is_normalised(tmp_path: Path, principles: Principles) -> None:
    """The scripted labeler's 1 + Binomial(8, p) has mean 1 + 8 p, and (1 + 8 p - 5) / 4 = 2 p - 1."""
    expected = [2 * sigmoid(4 * gold_score("letters", text)) - 1 for text in TEXTS]
    assert max(expected) > 0.5
    assert scores(tmp_path, mode=LabelMode.score, principles=principles) == pytest.approx(expected, abs=1e-6)


def test_only_a_mode_that_judges_one_completion_is_a_reward(tmp_path: Path) -> None:
    assert TrainConfig().labeling.mode is LabelMode.score
    for mode in set(LabelMode) - {LabelMode.score, LabelMode.pointwise}:
        with pytest.raises(UserError, match=rf"labeling.mode={mode}: reward=labeler .* give labeling.mode=score"):
            scores(tmp_path, mode=mode)


def test_a_run_that_labels_pairs_asks_for_scores_where_the_labeler_is_the_reward(tmp_path: Path) -> None:
    config = RunConfig()
    config.labeling = LabelingConfig(rationales=2, principles=Principles.together)
    arms = {reward: ArmConfig(method=Method.rloo, reward=reward) for reward in Reward}
    found = {reward: train_config(config, arm, tmp_path).labeling for reward, arm in arms.items()}
    assert found[Reward.pm] == config.labeling
    assert found[Reward.labeler] == LabelingConfig(mode=LabelMode.score, principles=Principles.together)
    config.labeling = LabelingConfig(mode=LabelMode.pointwise)
    assert train_config(config, arms[Reward.labeler], tmp_path).labeling == config.labeling


def test_a_sampled_principle_counts_alone(tmp_path: Path) -> None:
    """Each completion is asked under one principle: its verdict is the score, whatever the others would weigh."""
    expected = [4 * gold_score("letters", text) for text in TEXTS]
    assert scores(tmp_path, principles=Principles.sample) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("key", ["labeler.audit", "labeler.min_agreement", "labeling.calibrate"])
def test_a_labeler_that_was_to_be_measured_first_is_refused(key: str) -> None:
    group, name = key.split(".")
    labeler, labeling = replace(SCRIPTED), LabelingConfig(mode=LabelMode.score)
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
        LabelerReward(SCRIPTED, LabelingConfig(mode=LabelMode.score), None, 0).check()
