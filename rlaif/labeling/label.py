"""Asking: candidates and principles -> verdicts, each stored the moment it exists."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlaif.config import LabelingConfig, LabelMode
from rlaif.constitution import Constitution, Principle, check_mode
from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest
from rlaif.labeling.prompts import (
    LETTERS,
    letter_spellings,
    pairwise_prompt,
    pointwise_prompt,
    word_spellings,
)
from rlaif.labeling.store import VerdictStore
from rlaif.progress import progress
from rlaif.records import Candidates, Label, content_hash

log = logging.getLogger("rlaif")

_LETTER_OPTIONS = tuple(letter_spellings(letter) for letter in LETTERS)
_DEFAULT_MIN_MASS = {LabelMode.pairwise: 0.5, LabelMode.pointwise: 0.01}


@dataclass(frozen=True)
class Question:
    """One request to the labeler and the label that its answer fills in."""

    request: OptionRequest
    blank: Label


def label_candidates(
    lines: Sequence[Candidates],
    constitution: Constitution,
    engine: Engine,
    config: LabelingConfig,
    store: VerdictStore,
    seed: int = 0,
) -> list[Label]:
    """Ask the labeler everything that is not in the store yet; return all verdicts, in a fixed order.

    Failed requests are not stored, so a later run asks them again; in the result they are labels without a
    verdict, with their reason.
    """
    questions = list(build_questions(lines, constitution, engine.name, config))
    keys = [question_key(question, engine, seed) for question in questions]
    known = store.get(keys)
    pending = [index for index, key in enumerate(keys) if key not in known]
    if known:
        log.info("%d of %d verdicts are known already", len(questions) - len(pending), len(questions))
    failures: dict[str, Failure] = {}
    with progress(len(questions), "labeling", "verdict", initial=len(questions) - len(pending)) as bar:
        answers = engine.score_options(questions[index].request for index in pending)
        for place, answer in answers:
            key = keys[pending[place]]
            if isinstance(answer, Failure):
                failures[key] = answer
            else:
                known[key] = _stored(answer)
                store.put(key, known[key])
            bar.update()
    if failures:
        reasons = Counter(failure.reason for failure in failures.values())
        log.warning("%d requests failed: %s", len(failures), dict(reasons))
    minimum = _DEFAULT_MIN_MASS[config.mode] if config.min_option_mass is None else config.min_option_mass
    return [
        _fill(question.blank, known.get(key), failures.get(key), minimum)
        for question, key in zip(questions, keys, strict=True)
    ]


def build_questions(
    lines: Sequence[Candidates], constitution: Constitution, labeler: str, config: LabelingConfig
) -> Iterator[Question]:
    """Every question for these candidates; both orders and all principles of a pair close together.

    Raises:
        UserError: if the constitution lacks what the mode needs.
    """
    check_mode(constitution, config.mode)
    for line in lines:
        if config.mode is LabelMode.pointwise:
            yield from _pointwise(line, constitution, labeler)
        else:
            yield from _pairwise(line, constitution, labeler, config)


def _pointwise(line: Candidates, constitution: Constitution, labeler: str) -> Iterator[Question]:
    for candidate in line.candidates:
        for principle in constitution.principles:
            assert principle.statement is not None
            yield Question(
                OptionRequest(
                    messages=pointwise_prompt(principle, line.prompt.messages, candidate.completion),
                    options=(word_spellings(principle.yes), word_spellings(principle.no)),
                    stem=principle.statement,
                    meta={"mode": "pointwise", "completion": candidate.completion, "principle": principle.id},
                ),
                Label(
                    prompt_id=line.prompt.prompt_id,
                    mode="pointwise",
                    principle=principle.id,
                    labeler=labeler,
                    method="",
                    p=None,
                    candidate=candidate.candidate_id,
                ),
            )


def _pairwise(line: Candidates, constitution: Constitution, labeler: str, config: LabelingConfig) -> Iterator[Question]:
    for one, other in itertools.combinations(line.candidates, 2):
        for principle in constitution.principles:
            orders = [(one, other), (other, one)] if config.both_orders else [(one, other)]
            for first, second in orders:
                yield Question(
                    OptionRequest(
                        messages=pairwise_prompt(
                            principle,
                            line.prompt.messages,
                            first.completion,
                            second.completion,
                            _exemplars(constitution, principle) if config.exemplars else (),
                        ),
                        options=_LETTER_OPTIONS,
                        meta={
                            "mode": "pairwise",
                            "first": first.completion,
                            "second": second.completion,
                            "principle": principle.id,
                        },
                    ),
                    Label(
                        prompt_id=line.prompt.prompt_id,
                        mode="pairwise",
                        principle=principle.id,
                        labeler=labeler,
                        method="",
                        p=None,
                        first=first.candidate_id,
                        second=second.candidate_id,
                    ),
                )


def _exemplars(constitution: Constitution, principle: Principle) -> tuple[Any, ...]:
    return tuple(exemplar for exemplar in constitution.exemplars if exemplar.principle == principle.id)


def question_key(question: Question, engine: Engine, seed: int) -> str:
    """Hash of everything that can change the answer."""
    request = question.request
    scripted = request.meta if engine.identity["engine"] == "scripted" else None
    return content_hash(engine.identity, request.messages, request.options, request.stem, scripted, seed)


def _stored(answer: OptionMass) -> dict[str, Any]:
    return {
        "masses": list(answer.masses),
        "method": answer.method,
        "reply": answer.reply,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "latency_s": None if answer.latency_s is None else round(answer.latency_s, 4),
    }


def _fill(blank: Label, stored: dict[str, Any] | None, failure: Failure | None, minimum: float) -> Label:
    """The label with its verdict, or with the reason why there is none."""
    if stored is None:
        return replace(blank, method="none", reason=failure.reason if failure else "not_asked")
    label = replace(
        blank,
        method=stored["method"],
        reply=stored["reply"],
        prompt_tokens=stored["prompt_tokens"],
        completion_tokens=stored["completion_tokens"],
        latency_s=stored["latency_s"],
    )
    yes, no = stored["masses"]
    if yes is None or no is None:
        return replace(label, reason="option_unknown")
    mass = yes + no
    label = replace(label, option_mass=round(mass, 6))
    if mass <= 0 or mass < minimum:
        return replace(label, reason="uncovered")
    return replace(label, p=yes / mass)
