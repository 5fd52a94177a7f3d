"""Asking: candidates and principles -> verdicts, each stored the moment it exists."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlaif.config import LabelingConfig, LabelMode
from rlaif.constitution import Constitution, Principle, check_mode
from rlaif.engines.base import Engine, Failure, OptionMass, OptionRequest, SampleRequest
from rlaif.labeling.prompts import (
    LETTERS,
    after_rationale,
    letter_spellings,
    pairwise_prompt,
    pointwise_prompt,
    rationale_prompt,
    word_spellings,
)
from rlaif.labeling.store import VerdictStore
from rlaif.progress import progress
from rlaif.records import Candidates, Completion, Label, content_hash

log = logging.getLogger("rlaif")

_LETTER_OPTIONS = tuple(letter_spellings(letter) for letter in LETTERS)
_DEFAULT_MIN_MASS = {LabelMode.pairwise: 0.5, LabelMode.pointwise: 0.01}


@dataclass(frozen=True)
class Question:
    """One request to the labeler and the label that its answer fills in."""

    request: OptionRequest
    blank: Label
    rationales: tuple[SampleRequest, ...] = ()
    """Asked first; the request is then asked once after each, as ``after`` makes it."""
    after: Callable[[SampleRequest, str], OptionRequest] | None = None


@dataclass(frozen=True)
class _Ask:
    """One request that is made for a question, under its key in the store."""

    question: int
    request: OptionRequest
    key: str


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
    questions = list(build_questions(lines, constitution, engine.name, config, seed))
    asks, failures = _asks(questions, engine, store, seed)
    known = store.get([ask.key for ask in asks])
    pending = [ask for ask in asks if ask.key not in known]
    if known:
        log.info("%d of %d verdicts are known already", len(asks) - len(pending), len(asks))
    failed: dict[str, Failure] = {}
    with progress(len(asks), "labeling", "verdict", initial=len(asks) - len(pending)) as bar:
        for place, answer in engine.score_options(ask.request for ask in pending):
            key = pending[place].key
            if isinstance(answer, Failure):
                failed[key] = answer
            else:
                known[key] = _stored(answer)
                store.put(key, known[key])
            bar.update()
    for ask in asks:
        if ask.key in failed:
            failures.setdefault(ask.question, failed[ask.key])
    if failures:
        reasons = Counter(failure.reason for failure in failures.values())
        log.warning("%d verdicts failed: %s", len(failures), dict(reasons))
    answers: dict[int, list[dict[str, Any]]] = {}
    for ask in asks:
        if ask.key in known:
            stored = known[ask.key]
            if questions[ask.question].after is not None:
                # The labeler's own turn before the question: a reader wants to know what it had said.
                stored = {**stored, "reply": ask.request.messages[-2]["content"]}
            answers.setdefault(ask.question, []).append(stored)
    minimum = _DEFAULT_MIN_MASS[config.mode] if config.min_option_mass is None else config.min_option_mass
    clamp = config.clamp if config.rationales else 0.0
    return [
        _fill(question.blank, answers.get(index, []), failures.get(index), minimum, clamp)
        for index, question in enumerate(questions)
    ]


def _asks(
    questions: Sequence[Question], engine: Engine, store: VerdictStore, seed: int
) -> tuple[list[_Ask], dict[int, Failure]]:
    """The requests behind the questions; where rationales come first, those that are not in the store are sampled."""
    keyed = [
        [(_key(engine, seed, sample.messages, sample.max_new_tokens, sample.seed), sample) for sample in rationales]
        for rationales in (question.rationales for question in questions)
    ]
    samples = {key: sample for pairs in keyed for key, sample in pairs}
    texts = {key: str(value["text"]) for key, value in store.get(samples).items()}
    pending = [key for key in samples if key not in texts]
    failed: dict[str, Failure] = {}
    if samples:
        with progress(len(samples), "rationales", "rationale", initial=len(texts)) as bar:
            for place, sampled in engine.sample(samples[key] for key in pending):
                key = pending[place]
                if isinstance(sampled, Failure):
                    failed[key] = sampled
                elif not sampled.text.strip():
                    failed[key] = Failure("empty_rationale")
                else:
                    texts[key] = sampled.text
                    store.put(key, {"text": sampled.text})
                bar.update()
    asks: list[_Ask] = []
    failures: dict[int, Failure] = {}
    for index, question in enumerate(questions):
        if question.after is None:
            asks.append(_Ask(index, question.request, question_key(question.request, engine, seed)))
            continue
        for key, sample in keyed[index]:
            if key in texts:
                request = question.after(sample, texts[key])
                asks.append(_Ask(index, request, question_key(request, engine, seed)))
            else:
                failures.setdefault(index, failed[key])
    return asks, failures


def build_questions(
    lines: Sequence[Candidates], constitution: Constitution, labeler: str, config: LabelingConfig, seed: int = 0
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
            yield from _pairwise(line, constitution, labeler, config, seed)


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


def _pairwise(
    line: Candidates, constitution: Constitution, labeler: str, config: LabelingConfig, seed: int
) -> Iterator[Question]:
    for one, other in itertools.combinations(line.candidates, 2):
        for principle in constitution.principles:
            orders = [(one, other), (other, one)] if config.both_orders else [(one, other)]
            for first, second in orders:
                rationales, after = _rationales(principle, line, first, second, config, seed)
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
                    rationales,
                    after,
                )


def _rationales(
    principle: Principle, line: Candidates, first: Completion, second: Completion, config: LabelingConfig, seed: int
) -> tuple[tuple[SampleRequest, ...], Callable[[SampleRequest, str], OptionRequest] | None]:
    """What is asked before the verdict, and how the verdict is asked after it."""
    if not config.rationales:
        return (), None
    messages = rationale_prompt(principle, line.prompt.messages, first.completion, second.completion)
    meta = {"mode": "pairwise", "first": first.completion, "second": second.completion, "principle": principle.id}

    def after(asked: SampleRequest, rationale: str) -> OptionRequest:
        return OptionRequest(after_rationale(asked.messages, rationale, principle), _LETTER_OPTIONS, meta=meta)

    # Each has a seed of its own, or they would all be the same.
    seeds = [int(content_hash(seed, messages, number)[:7], 16) for number in range(config.rationales)]
    return tuple(SampleRequest(messages, config.rationale_tokens, seed=number) for number in seeds), after


def _exemplars(constitution: Constitution, principle: Principle) -> tuple[Any, ...]:
    return tuple(exemplar for exemplar in constitution.exemplars if exemplar.principle == principle.id)


def question_key(request: OptionRequest, engine: Engine, seed: int) -> str:
    """Hash of everything that can change the answer."""
    scripted = request.meta if engine.identity["engine"] == "scripted" else None
    return content_hash(engine.identity, request.messages, request.options, request.stem, scripted, seed)


def _key(engine: Engine, seed: int, *content: Any) -> str:
    """Hash of everything that can change a rationale."""
    return content_hash("rationale", engine.identity, seed, *content)


def _stored(answer: OptionMass) -> dict[str, Any]:
    return {
        "masses": list(answer.masses),
        "method": answer.method,
        "reply": answer.reply,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "latency_s": None if answer.latency_s is None else round(answer.latency_s, 4),
    }


def _fill(
    blank: Label, answers: Sequence[Mapping[str, Any]], failure: Failure | None, minimum: float, clamp: float
) -> Label:
    """The label with its verdict (the mean over its answers), or with the reason why there is none."""
    if failure is not None or not answers:
        return replace(blank, method="none", reason=failure.reason if failure else "not_asked")
    label = replace(
        blank,
        method=answers[0]["method"],
        reply="\n\n".join(str(answer["reply"]) for answer in answers if answer["reply"] is not None) or None,
        prompt_tokens=_sum(answers, "prompt_tokens"),
        completion_tokens=_sum(answers, "completion_tokens"),
        latency_s=_sum(answers, "latency_s"),
    )
    known = [tuple(answer["masses"]) for answer in answers if None not in answer["masses"]]
    if not known:
        return replace(label, reason="option_unknown")
    label = replace(label, option_mass=round(sum(sum(masses) for masses in known) / len(known), 6))
    covered = [masses for masses in known if sum(masses) > 0 and sum(masses) >= minimum]
    if not covered:
        return replace(label, reason="uncovered")
    verdicts = [yes / (yes + no) for yes, no in covered]
    if clamp:
        verdicts = [min(max(p, clamp), 1 - clamp) for p in verdicts]
    return replace(label, p=sum(verdicts) / len(verdicts))


def _sum(answers: Sequence[Mapping[str, Any]], name: str) -> Any:
    values = [answer[name] for answer in answers if answer[name] is not None]
    return sum(values) if values else None
