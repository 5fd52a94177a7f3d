"""What scores completions during training and in best-of-n: a preference model, or the labeler itself."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlaif.artifacts import labeler_inputs
from rlaif.config import LabelerConfig, LabelingConfig, LabelMode, ModelConfig, PMConfig
from rlaif.constitution import Constitution, check_mode, find_constitution, load_constitution
from rlaif.engines import build_labeler
from rlaif.engines.base import Engine
from rlaif.labeling.aggregate import logit
from rlaif.labeling.label import label_candidates
from rlaif.labeling.modes import Setup
from rlaif.labeling.prompts import SCALE
from rlaif.labeling.store import STORE, STORE_FILES, VerdictStore
from rlaif.labeling.verdicts import advice
from rlaif.processes import from_all, from_main, is_main, rank, world_size
from rlaif.records import Candidates, Completion, Example, Label, Prompt, UserError

log = logging.getLogger("rlaif")


REWARD_MODES = (LabelMode.score, LabelMode.pointwise)
"""Ways to ask a labeler that judge one completion by itself."""


class RewardModel(Protocol):
    """Scores of completions; None where there is no verdict."""

    def score(self, examples: Sequence[Example]) -> Sequence[float | None]:
        """One score an example; higher is better."""


class RewardSource(Protocol):
    """A reward that a stage opens while it runs; ``settings`` and ``inputs`` are its part of the fingerprint."""

    @property
    def carry_over(self) -> tuple[str, ...]:
        """Files of an outdated folder that stay useful."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the scores besides the inputs."""

    @property
    def inputs(self) -> dict[str, Path | str | None]:
        """What is read, by role."""

    def open(self, folder: Path) -> contextlib.AbstractContextManager[RewardModel]:
        """The reward, for the length of the block; ``folder`` is where the stage works."""


@dataclass(frozen=True)
class PMReward:
    """The score of a preference model, or of an ensemble."""

    folder: Path
    policy: ModelConfig
    pm: PMConfig
    carry_over: tuple[str, ...] = ()

    @property
    def is_ensemble(self) -> bool:
        """Whether several PMs score."""
        return (self.folder / "ensemble.json").is_file()

    @property
    def settings(self) -> dict[str, Any]:
        if not self.is_ensemble:
            return {}
        return {"ensemble_score": self.pm.ensemble_score, "ensemble_penalty": self.pm.ensemble_penalty}

    @property
    def inputs(self) -> dict[str, Path | str | None]:
        return {"preference_model": self.folder}

    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[RewardModel]:
        from rlaif.preference_model import load_scorer, pm_config

        yield load_scorer(pm_config(self.policy, self.folder), self.pm.ensemble_score, self.pm.ensemble_penalty)


def check_unaudited(role: str, labeler: LabelerConfig, labeling: LabelingConfig) -> None:
    """Training asks its labeler as it is.

    Raises:
        UserError: where settings ask for the labeler to be measured on people's pairs first.
    """
    asked = {
        "labeler.audit": labeler.audit,
        "labeler.min_agreement": labeler.min_agreement,
        "labeling.calibrate": labeling.calibrate,
    }
    for key, value in asked.items():
        if value is not None:
            raise UserError(
                f"{key}={value}: {role} does not measure its labeler; run rlaif.audit first and leave {key} out"
            )


@dataclass(frozen=True)
class LabelerReward:
    """The labeler's own verdict on each completion, without a PM (Lee et al. 2023, section 2.3: direct RLAIF)."""

    labeler: LabelerConfig
    labeling: LabelingConfig
    constitution: str | None
    seed: int
    carry_over: tuple[str, ...] = STORE_FILES

    def check(self) -> None:
        """Fail early on what is missing.

        Raises:
            UserError: naming the setting.
        """
        if self.labeler.type is None:
            raise UserError("reward=labeler needs a labeler: labeler=hf, labeler=vllm, labeler=openai or scripted")
        check_unaudited("reward=labeler", self.labeler, self.labeling)
        mode = self.labeling.mode
        if mode not in REWARD_MODES:
            raise UserError(
                f"labeling.mode={mode.value}: reward=labeler judges one completion at a time; give labeling.mode=score "
                "or pointwise"
            )
        check_mode(load_constitution(self.constitution), mode)

    @property
    def settings(self) -> dict[str, Any]:
        return {"labeler": self.labeler, "labeling": self.labeling}

    @property
    def inputs(self) -> dict[str, Path | str | None]:
        return {"constitution": find_constitution(self.constitution), **labeler_inputs(self.labeler)}

    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[RewardModel]:
        if not is_main():
            yield AskedByMain(None)
            return
        constitution = load_constitution(self.constitution)
        with build_labeler(self.labeler, self.seed) as engine, VerdictStore(folder / STORE) as store:
            scores = LabelerScores(engine, constitution, self.labeling, store, self.seed)
            yield scores if world_size() == 1 else AskedByMain(scores)


@dataclass(frozen=True)
class AskedByMain:
    """Scores for several processes, all of which ask at the same time: there is one labeler, store and budget."""

    scores: LabelerScores | None
    """None in all but the main process."""

    def score(self, examples: Sequence[Example]) -> list[float | None]:
        """As :meth:`LabelerScores.score`, of this process's examples."""
        parts = from_all(list(examples))

        def ask() -> list[float | None]:
            assert self.scores is not None
            return self.scores.score([example for part in parts for example in part])

        before = sum(len(part) for part in parts[: rank()])
        return from_main(ask)[before : before + len(examples)]


@dataclass(frozen=True)
class LabelerScores:
    """Verdicts on single completions as scores; each is in the store, and asked once."""

    engine: Engine
    constitution: Constitution
    labeling: LabelingConfig
    store: VerdictStore
    seed: int

    def score(self, examples: Sequence[Example]) -> list[float | None]:
        """The weighted mean over the principles asked of :func:`verdict_value`, divided by ``labeling.temperature``.

        Raises:
            UserError: if the labeler gave no verdict at all.
        """
        lines = [
            Candidates(Prompt(str(index), tuple(example.prompt)), (Completion("0", example.completion),))
            for index, example in enumerate(examples)
        ]
        weights = Setup(self.constitution, self.engine.name, self.labeling, self.seed).weights
        totals, asked = [0.0] * len(lines), [0.0] * len(lines)
        missing: set[int] = set()
        reasons: list[str | None] = []
        labels = label_candidates(lines, self.constitution, self.engine, self.labeling, self.store, self.seed)
        for label in labels:
            index = int(label.prompt_id)
            value = verdict_value(label)
            if value is None:
                missing.add(index)
                reasons.append(label.reason)
            else:
                totals[index] += weights[label.principle] * value
                asked[index] += weights[label.principle]
        if missing and len(missing) == len(lines):
            raise UserError(
                f"the labeler gave no usable verdict on {len(lines)} completions; first: {reasons[0]}{advice(reasons)}"
            )
        if missing:
            log.warning(
                "reward: %d of %d completions have no verdict (first: %s)", len(missing), len(lines), reasons[0]
            )
        # Each by the weights of its own principles: with labeling.principles=sample it was asked under one of them.
        return [
            None if index in missing else total / (weight * self.labeling.temperature)
            for index, (total, weight) in enumerate(zip(totals, asked, strict=True))
        ]


def verdict_value(label: Label) -> float | None:
    """What a verdict on one completion is worth; None if there is none.

    Score: the expected score, from 1 ... 9 to -1 ... 1 (Lee et al. 2023, section 2.3, who take 1 ... 10). Pointwise:
    the logit of P(the completion satisfies the principle).
    """
    if label.score is not None:
        middle = (SCALE[0] + SCALE[-1]) / 2
        return (label.score - middle) / (SCALE[-1] - middle)
    return None if label.p is None else logit(label.p)


def known_scores(scores: Sequence[float | None]) -> list[float]:
    """Scores with the mean of the known ones where there is none: neither a prize nor a punishment."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known)
    return [mean if score is None else score for score in scores]
