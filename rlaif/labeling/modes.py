"""How one prompt's candidates are labeled, mode by mode.

A mode is a *talk*: a generator that yields the requests it needs next, is sent their answers, and returns the labels.
A talk decides by its answers alone, so it can be held again from stored answers and comes to the same end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlaif.config import LabelingConfig, LabelMode
from rlaif.constitution import Constitution, Exemplar, Principle, check_mode
from rlaif.engines.base import Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.labeling.prompts import (
    LETTERS,
    after_rationale,
    is_truncated,
    letter_spellings,
    pairwise_prompt,
    pointwise_prompt,
    rationale_prompt,
    word_spellings,
)
from rlaif.records import Candidates, Completion, Label, content_hash

Request = OptionRequest | SampleRequest
Answer = OptionMass | Sampled | Failure
Talk = Generator[Sequence[Request], Sequence[Answer], list[Label]]

_LETTER_OPTIONS = tuple(letter_spellings(letter) for letter in LETTERS)
_DEFAULT_MIN_MASS = {LabelMode.pairwise: 0.5, LabelMode.pointwise: 0.01}


@dataclass(frozen=True)
class Setup:
    """What the talks of one run share.

    Raises:
        UserError: if the constitution lacks what the mode needs.
    """

    constitution: Constitution
    labeler: str
    config: LabelingConfig
    seed: int = 0

    def __post_init__(self) -> None:
        check_mode(self.constitution, self.config.mode)

    @property
    def kinds(self) -> tuple[type, ...]:
        """The kinds of request that a talk makes, in the order in which it makes them."""
        return (SampleRequest, OptionRequest) if self.config.rationales else (OptionRequest,)

    @property
    def minimum(self) -> float:
        """Option mass below which a verdict is uncovered."""
        given = self.config.min_option_mass
        return _DEFAULT_MIN_MASS[self.config.mode] if given is None else given

    def talk(self, line: Candidates) -> Talk:
        """The talk about one prompt's candidates."""
        return _TALKS[self.config.mode](self, line)

    def expected(self, candidates: int) -> int:
        """How many requests of the last kind a prompt with so many candidates takes."""
        principles = len(self.constitution.principles)
        if self.config.mode is LabelMode.pointwise:
            return candidates * principles
        orders = 2 if self.config.both_orders else 1
        return candidates * (candidates - 1) // 2 * principles * orders * max(self.config.rationales, 1)


def _pointwise(setup: Setup, line: Candidates) -> Talk:
    """A verdict word on each completion under each principle."""
    asked = list(itertools.product(line.candidates, setup.constitution.principles))
    answers = yield [_pointwise_request(line, candidate, principle) for candidate, principle in asked]
    return [
        verdict(_blank(setup, line, principle, candidate=candidate.candidate_id), [answer], setup.minimum)
        for (candidate, principle), answer in zip(asked, answers, strict=True)
    ]


def _pointwise_request(line: Candidates, candidate: Completion, principle: Principle) -> OptionRequest:
    assert principle.statement is not None
    return OptionRequest(
        messages=pointwise_prompt(principle, line.prompt.messages, candidate.completion),
        options=(word_spellings(principle.yes), word_spellings(principle.no)),
        stem=principle.statement,
        meta={"mode": "pointwise", "completion": candidate.completion, "principle": principle.id},
    )


@dataclass(frozen=True)
class _Comparison:
    """Two completions in the order shown, under one principle."""

    principle: Principle
    first: Completion
    second: Completion

    @property
    def meta(self) -> dict[str, str]:
        return {
            "mode": "pairwise",
            "first": self.first.completion,
            "second": self.second.completion,
            "principle": self.principle.id,
        }


def _pairwise(setup: Setup, line: Candidates) -> Talk:
    """Which of two completions is better, by a letter; with rationales, after reasoning."""
    asked = list(_comparisons(setup, line))
    if setup.config.rationales:
        found = yield from _reasoned(setup, line, asked)
    else:
        answers = yield [_pairwise_request(setup, line, comparison) for comparison in asked]
        found = [[answer] for answer in answers]
    clamp = setup.config.clamp if setup.config.rationales else 0.0
    return [
        verdict(
            _blank(
                setup,
                line,
                comparison.principle,
                first=comparison.first.candidate_id,
                second=comparison.second.candidate_id,
            ),
            answers,
            setup.minimum,
            clamp,
        )
        for comparison, answers in zip(asked, found, strict=True)
    ]


def _comparisons(setup: Setup, line: Candidates) -> Iterator[_Comparison]:
    """Both orders and all principles of a pair close together, so that engines can reuse what they share."""
    for one, other in itertools.combinations(line.candidates, 2):
        for principle in setup.constitution.principles:
            yield _Comparison(principle, one, other)
            if setup.config.both_orders:
                yield _Comparison(principle, other, one)


def _pairwise_request(setup: Setup, line: Candidates, comparison: _Comparison) -> OptionRequest:
    principle = comparison.principle
    exemplars: tuple[Exemplar, ...] = ()
    if setup.config.exemplars:
        exemplars = tuple(shot for shot in setup.constitution.exemplars if shot.principle == principle.id)
    first, second = comparison.first.completion, comparison.second.completion
    messages = pairwise_prompt(principle, line.prompt.messages, first, second, exemplars)
    return OptionRequest(messages, _LETTER_OPTIONS, meta=comparison.meta)


def _reasoned(
    setup: Setup, line: Candidates, asked: Sequence[_Comparison]
) -> Generator[Sequence[Request], Sequence[Answer], list[list[Answer]]]:
    """The answers to each comparison, one after each of its rationales; a failed rationale fails its comparison."""
    samples = [_rationale_requests(setup, line, comparison) for comparison in asked]
    flat = iter((yield [request for requests in samples for request in requests]))
    rationales = [[_checked(next(flat)) for _ in requests] for requests in samples]
    verdicts: list[Request] = [
        OptionRequest(
            after_rationale(request.messages, rationale.text, comparison.principle),
            _LETTER_OPTIONS,
            meta=comparison.meta,
        )
        for comparison, requests, found in zip(asked, samples, rationales, strict=True)
        for request, rationale in zip(requests, found, strict=True)
        if isinstance(rationale, Sampled)
    ]
    answers = iter((yield verdicts) if verdicts else ())
    return [
        [
            rationale if isinstance(rationale, Failure) else _with_reply(next(answers), rationale.text)
            for rationale in found
        ]
        for found in rationales
    ]


def _rationale_requests(setup: Setup, line: Candidates, comparison: _Comparison) -> list[SampleRequest]:
    first, second = comparison.first.completion, comparison.second.completion
    messages = rationale_prompt(comparison.principle, line.prompt.messages, first, second)
    # Each has a seed of its own, or they would all be the same.
    seeds = [int(content_hash(setup.seed, messages, number)[:7], 16) for number in range(setup.config.rationales)]
    return [SampleRequest(messages, setup.config.rationale_tokens, seed=seed) for seed in seeds]


def _checked(answer: Answer) -> Sampled | Failure:
    """A rationale, which must say something."""
    if isinstance(answer, Failure):
        return answer
    assert isinstance(answer, Sampled)
    return answer if answer.text.strip() else Failure("empty_rationale")


def _with_reply(answer: Answer, rationale: str) -> Answer:
    """A reader wants to know what the labeler had said before its verdict."""
    return replace(answer, reply=rationale) if isinstance(answer, OptionMass) else answer


_TALKS: Mapping[LabelMode, Callable[[Setup, Candidates], Talk]] = {
    LabelMode.pairwise: _pairwise,
    LabelMode.pointwise: _pointwise,
}


def _blank(setup: Setup, line: Candidates, principle: Principle, **shown: Any) -> Label:
    """A label without its verdict; ``shown`` names the candidates by their ids."""
    completions = [candidate.completion for candidate in line.candidates if candidate.candidate_id in shown.values()]
    alone = setup.config.mode is LabelMode.pointwise and principle.ask is not None
    return Label(
        prompt_id=line.prompt.prompt_id,
        mode=setup.config.mode.value,
        principle=principle.id,
        labeler=setup.labeler,
        method="",
        p=None,
        truncated=is_truncated(() if alone else line.prompt.messages, *completions) or None,
        **shown,
    )


def verdict(blank: Label, answers: Sequence[Answer], minimum: float, clamp: float = 0.0) -> Label:
    """The label with its verdict (the mean over its answers), or with the reason why there is none."""
    failed = [answer for answer in answers if isinstance(answer, Failure)]
    if failed:
        return replace(blank, method="none", reason=failed[0].reason)
    found = [answer for answer in answers if isinstance(answer, OptionMass)]
    known = [(yes, no) for yes, no in (answer.masses for answer in found) if yes is not None and no is not None]
    covered = [masses for masses in known if sum(masses) > 0 and sum(masses) >= minimum]
    verdicts = [yes / (yes + no) for yes, no in covered]
    if clamp:
        verdicts = [min(max(p, clamp), 1 - clamp) for p in verdicts]
    return replace(
        blank,
        method=found[0].method,
        p=sum(verdicts) / len(verdicts) if verdicts else None,
        reason=None if verdicts else "uncovered" if known else "option_unknown",
        option_mass=round(sum(sum(masses) for masses in known) / len(known), 6) if known else None,
        reply="\n\n".join(answer.reply for answer in found if answer.reply is not None) or None,
        prompt_tokens=_sum(answer.prompt_tokens for answer in found),
        completion_tokens=_sum(answer.completion_tokens for answer in found),
    )


def _sum(counts: Iterator[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
