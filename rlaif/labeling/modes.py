"""How one prompt's candidates are labeled, mode by mode.

A mode is a *talk*: a generator that yields the requests it needs next, is sent their answers, and returns the labels.
A talk decides by its answers alone, so it can be held again from stored answers and comes to the same end.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlaif.config import LabelingConfig, LabelMode, Pairs, Principles
from rlaif.constitution import Constitution, Exemplar, Principle, check_mode, together
from rlaif.engines.base import CompletionRequest, Failure, OptionMass, OptionRequest, Sampled, SampleRequest
from rlaif.labeling.aggregate import Calibration, PairLabel, combine
from rlaif.labeling.pairs import Shown, compare
from rlaif.labeling.prompts import (
    LETTERS,
    SCALE,
    after_rationale,
    contrastive_prompt,
    is_truncated,
    letter_spellings,
    listwise_prompt,
    number_spellings,
    pairwise_prompt,
    pointwise_prompt,
    rationale_prompt,
    score_prompt,
    word_spellings,
)
from rlaif.labeling.verdicts import (
    Answer,
    Blank,
    distribution,
    expected_score,
    likelihood_ratio,
    probability,
    total_count,
)
from rlaif.records import Candidates, Completion, Label, Prompt, UserError, content_hash

Request = OptionRequest | SampleRequest | CompletionRequest
Talk = Generator[Sequence[Request], Sequence[Answer], list[Label]]

_LETTER_OPTIONS = tuple(letter_spellings(letter) for letter in LETTERS)
_NUMBER_OPTIONS = tuple(number_spellings(number) for number in SCALE)


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
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        check_mode(self.constitution, self.config.mode, self.config.exemplars)

    @property
    def adaptive(self) -> bool:
        """Whether what a talk asks depends on its answers, so that it asks more than once."""
        config = self.config
        one_round = config.second_order_below is None and config.stop_principles_above is None
        return config.pairs is not Pairs.all or not one_round

    def pairs(self, labels: Sequence[Label]) -> tuple[list[PairLabel], dict[str, int]]:
        """The pair labels that verdicts make, and counts of dropped pairs by reason."""
        return combine(labels, self.weights, self.config, self.calibration)

    @property
    def kinds(self) -> tuple[type, ...]:
        """The kinds of request that a talk makes, in the order in which it makes them."""
        if self.config.mode is LabelMode.contrastive:
            return (CompletionRequest,)
        return (SampleRequest, OptionRequest) if self.config.rationales else (OptionRequest,)

    @property
    def answers_per_label(self) -> int:
        """How many answers to requests of the last kind make one label."""
        return 2 if self.config.mode is LabelMode.contrastive else max(self.config.rationales, 1)

    @property
    def minimum(self) -> float:
        """Option mass below which a verdict is uncovered."""
        if self.config.min_option_mass is not None:
            return self.config.min_option_mass
        # After a statement many words could follow that are on neither list.
        return 0.01 if self.config.mode is LabelMode.pointwise else 0.5

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each principle that verdicts are given under."""
        asked = self.constitution.principles
        if self.config.principles is Principles.together:
            asked = (together(self.constitution),)
        return {principle.id: principle.weight for principle in asked}

    def principles(self, prompt: Prompt, compared: Sequence[Completion] = ()) -> tuple[Principle, ...]:
        """What to ask a comparison under.

        A sampled principle is a function of the seed, the prompt and the texts compared, whatever their order: all
        orders of a pair are asked under the same one. Where completions are judged one at a time, ``compared`` is
        empty, and all of a prompt's completions are judged by the same one.
        """
        if self.config.principles is Principles.together:
            return (together(self.constitution),)
        asked = self.constitution.principles
        if self.config.principles is Principles.each:
            return asked
        texts = sorted(candidate.completion for candidate in compared)
        rng = random.Random(content_hash("principle", self.seed, prompt.messages, texts))
        return tuple(rng.choices(asked, [principle.weight for principle in asked]))

    def talk(self, line: Candidates) -> Talk:
        """The talk about one prompt's candidates."""
        return _TALKS[self.config.mode](self, line)

    def expected(self, candidates: int) -> int:
        """How many requests of the last kind a prompt with so many candidates takes, at most.

        Raises:
            UserError: if the mode cannot take so many.
        """
        mode, orders = self.config.mode, 2 if self.config.both_orders else 1
        principles = len(self.constitution.principles) if self.config.principles is Principles.each else 1
        if mode is LabelMode.pairwise:
            return candidates * (candidates - 1) // 2 * principles * orders * max(self.config.rationales, 1)
        if mode is LabelMode.listwise:
            if candidates > len(LETTERS):
                raise UserError(
                    f"labeling.mode=listwise takes up to {len(LETTERS)} candidates a prompt, and one prompt has "
                    f"{candidates}; labeling.mode=pairwise, pointwise and score take any number"
                )
            return len(self.rotations(candidates)) * principles
        return candidates * principles * (2 if mode is LabelMode.contrastive else 1)

    def rotations(self, candidates: int) -> list[int]:
        """By how many places the list is turned for each order in which it is shown, spread evenly."""
        count = candidates if self.config.both_orders else 1
        if self.config.rotations is not None:
            count = min(self.config.rotations, candidates)
        return [place * candidates // count for place in range(count)]


def _pointwise(setup: Setup, line: Candidates) -> Talk:
    """A verdict word on each completion under each principle."""
    asked = list(itertools.product(line.candidates, setup.principles(line.prompt)))
    answers = yield [_pointwise_request(line, candidate, principle) for candidate, principle in asked]
    return [
        probability(_blank(setup, line, principle, candidate=candidate.candidate_id), [answer], setup.minimum)
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

    def ask(shown: Sequence[Shown]) -> Talk:
        asked = [_Comparison(*comparison) for comparison in shown]
        if setup.config.rationales:
            found = yield from _reasoned(setup, line, asked)
        else:
            answers = yield [_pairwise_request(setup, line, comparison) for comparison in asked]
            found = [[answer] for answer in answers]
        clamp = setup.config.clamp if setup.config.rationales else 0.0
        return [
            probability(
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

    return (yield from compare(setup, line, ask))


def _pairwise_request(setup: Setup, line: Candidates, comparison: _Comparison) -> OptionRequest:
    principle = comparison.principle
    exemplars: tuple[Exemplar, ...] = ()
    if setup.config.exemplars:
        shots = setup.constitution.exemplars
        exemplars = tuple(shot for shot in shots if principle.parts or shot.principle == principle.id)
    first, second = comparison.first.completion, comparison.second.completion
    messages = pairwise_prompt(principle, line.prompt.messages, first, second, exemplars)
    return OptionRequest(messages, _LETTER_OPTIONS[:2], meta=comparison.meta)


def _reasoned(
    setup: Setup, line: Candidates, asked: Sequence[_Comparison]
) -> Generator[Sequence[Request], Sequence[Answer], list[list[Answer]]]:
    """The answers to each comparison after its rationales, as :func:`probability` takes them; any failure fails it."""
    samples = [_rationale_requests(setup, line, comparison) for comparison in asked]
    flat = iter((yield [request for requests in samples for request in requests]))
    rationales = [[_checked(next(flat)) for _ in requests] for requests in samples]
    verdicts: list[Request] = [
        OptionRequest(
            after_rationale(request.messages, rationale.text, comparison.principle),
            _LETTER_OPTIONS[:2],
            meta=comparison.meta,
        )
        for comparison, requests, found in zip(asked, samples, rationales, strict=True)
        for request, rationale in zip(requests, found, strict=True)
        if isinstance(rationale, Sampled)
    ]
    answers = iter((yield verdicts) if verdicts else ())
    return [
        [
            part
            for rationale in found
            for part in ((rationale,) if isinstance(rationale, Failure) else _with_rationale(next(answers), rationale))
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


def _with_rationale(answer: Answer, rationale: Sampled) -> tuple[Answer, ...]:
    """The verdict after a rationale: with what the labeler had said before, and what saying it took."""
    if not isinstance(answer, OptionMass):
        return rationale, answer
    answer = replace(
        answer,
        reply=rationale.text,
        prompt_tokens=total_count([answer.prompt_tokens, rationale.prompt_tokens]),
        completion_tokens=total_count([answer.completion_tokens, rationale.tokens]),
    )
    return (answer,)


def _listwise(setup: Setup, line: Candidates) -> Talk:
    """Which of all completions is the best, by a letter, in several orders of the list.

    Each order is turned by some places against the first. With as many orders as candidates, each candidate stands in
    each position once, so a bias of the positions that adds to the log-probabilities adds the same to every
    candidate's mean, and cancels in their differences. With fewer, chance decides where they start: else what is left
    of a bias would always help the same candidates.
    """
    listed = line.candidates
    turns = setup.rotations(len(listed))
    if len(turns) < len(listed):
        texts = sorted(candidate.completion for candidate in listed)
        start = int(content_hash("order", setup.seed, *texts)[:8], 16)
        turns = [(start + places) % len(listed) for places in turns]
    orders = [(*listed[places:], *listed[:places]) for places in turns]
    asked = list(itertools.product(orders, setup.principles(line.prompt, listed)))
    answers = yield [
        OptionRequest(
            listwise_prompt(principle, line.prompt.messages, texts),
            _LETTER_OPTIONS[: len(texts)],
            meta={"mode": "listwise", "completions": texts, "principle": principle.id},
        )
        for order, principle in asked
        for texts in [[candidate.completion for candidate in order]]
    ]
    return [
        distribution(
            _blank(setup, line, principle, order=tuple(candidate.candidate_id for candidate in order)),
            answer,
            setup.minimum,
        )
        for (order, principle), answer in zip(asked, answers, strict=True)
    ]


def _score(setup: Setup, line: Candidates) -> Talk:
    """A number from 1 to 9 for each completion under each principle."""
    asked = list(itertools.product(line.candidates, setup.principles(line.prompt)))
    answers = yield [
        OptionRequest(
            score_prompt(principle, line.prompt.messages, candidate.completion),
            _NUMBER_OPTIONS,
            meta={"mode": "score", "completion": candidate.completion, "principle": principle.id},
        )
        for candidate, principle in asked
    ]
    return [
        expected_score(_blank(setup, line, principle, candidate=candidate.candidate_id), answer, setup.minimum)
        for (candidate, principle), answer in zip(asked, answers, strict=True)
    ]


def _contrastive(setup: Setup, line: Candidates) -> Talk:
    """How much likelier each completion is under a system prompt that encourages the principle than under its opposite.

    The contrast is that of RLCD (Yang et al. 2023), its use as a score that of DLMA (Liu et al. 2024).
    """
    asked = list(itertools.product(line.candidates, setup.principles(line.prompt)))
    answers = yield [
        _likelihood_request(line, candidate, principle, encouraged)
        for candidate, principle in asked
        for encouraged in (True, False)
    ]
    return [
        likelihood_ratio(
            _blank(setup, line, principle, candidate=candidate.candidate_id),
            answers[2 * place : 2 * place + 2],
            setup.config.length_normalize,
        )
        for place, (candidate, principle) in enumerate(asked)
    ]


def _likelihood_request(
    line: Candidates, candidate: Completion, principle: Principle, encouraged: bool
) -> CompletionRequest:
    instruction = principle.encourage if encouraged else principle.discourage
    assert instruction is not None
    return CompletionRequest(
        contrastive_prompt(instruction, line.prompt.messages),
        candidate.completion,
        meta={"mode": "contrastive", "encouraged": encouraged, "principle": principle.id},
    )


_TALKS: Mapping[LabelMode, Callable[[Setup, Candidates], Talk]] = {
    LabelMode.pairwise: _pairwise,
    LabelMode.pointwise: _pointwise,
    LabelMode.score: _score,
    LabelMode.listwise: _listwise,
    LabelMode.contrastive: _contrastive,
}


def _blank(setup: Setup, line: Candidates, principle: Principle, **shown: Any) -> Blank:
    """A label but for its verdict; ``shown`` names the candidates by their ids."""
    names = {*shown.get("order", ()), *(name for name in shown.values() if isinstance(name, str))}
    completions = [candidate.completion for candidate in line.candidates if candidate.candidate_id in names]
    # What is scored as a completion is read whole; a pointwise question of its own leaves the conversation out.
    whole = setup.config.mode is LabelMode.contrastive
    alone = setup.config.mode is LabelMode.pointwise and principle.ask is not None
    return functools.partial(
        Label,
        prompt_id=line.prompt.prompt_id,
        mode=setup.config.mode.value,
        principle=principle.id,
        labeler=setup.labeler,
        truncated=(not whole and is_truncated(() if alone else line.prompt.messages, *completions)) or None,
        **shown,
    )
