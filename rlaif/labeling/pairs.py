"""Which pairs of a prompt's candidates are asked, in which orders and under which principles.

Every generator here yields requests and is sent answers by way of ``ask``, and decides by the verdicts alone, so that
it can be held again from stored answers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from rlaif.config import Pairs, Principles
from rlaif.constitution import Principle
from rlaif.labeling.aggregate import is_lost, logit
from rlaif.labeling.ranking import uncertain_pairs
from rlaif.records import Candidates, Completion, Label, Prompt, content_hash

if TYPE_CHECKING:
    from rlaif.labeling.modes import Setup

Pair = tuple[Completion, Completion]
Shown = tuple[Principle, Completion, Completion]
"""A principle and two completions, in the order shown."""
Verdicts = Generator[Any, Any, list[Label]]
Ask = Callable[[Sequence[Shown]], Verdicts]
"""Asks for verdicts; returns a label of each, in the same order."""


def compare(setup: Setup, line: Candidates, ask: Ask) -> Verdicts:
    """Every verdict on the pairs of one prompt's candidates, by ``labeling.pairs``."""
    if setup.config.pairs is Pairs.against_best:
        return (yield from _against_best(setup, line, ask))
    if setup.config.pairs is Pairs.adaptive:
        return (yield from _adaptive(setup, line, ask))
    return (yield from _judge(setup, line.prompt, list(itertools.combinations(line.candidates, 2)), ask))


def _against_best(setup: Setup, line: Candidates, ask: Ask) -> Verdicts:
    """The best so far against the next candidate, as in the search for a maximum: K - 1 pairs, one after another.

    The label of the pair decides, that is both orders together; a tie, or a pair without a verdict, changes nothing.
    """
    labels: list[Label] = []
    best, *others = line.candidates
    for challenger in others:
        found = yield from _judge(setup, line.prompt, [(best, challenger)], ask)
        labels += found
        for pair in setup.pairs(found)[0]:
            if pair.logit and (pair.one if pair.logit > 0 else pair.other) == challenger.candidate_id:
                best = challenger
    return labels


def _adaptive(setup: Setup, line: Candidates, ask: Ask) -> Verdicts:
    """Round after round the pairs whose order is least certain given what is known, at most K / 2 of them a round.

    Bradley-Terry scores are fitted to the labels so far; :func:`rlaif.labeling.ranking.uncertain_pairs` says which
    pairs are next and when the order is certain enough to stop, unless ``pairs_per_prompt`` stops it before.
    """
    budget = setup.config.pairs_per_prompt
    place = {candidate.candidate_id: number for number, candidate in enumerate(line.candidates)}
    labels: list[Label] = []
    asked: set[tuple[int, int]] = set()
    while budget is None or len(asked) < budget:
        known = [(place[pair.one], place[pair.other], pair.logit) for pair in setup.pairs(labels)[0]]
        left = None if budget is None else budget - len(asked)
        chosen = uncertain_pairs(len(place), known, asked, left)
        if not chosen:
            break
        asked.update(chosen)
        pairs = [(line.candidates[i], line.candidates[j]) for i, j in chosen]
        labels += yield from _judge(setup, line.prompt, pairs, ask)
    return labels


def _judge(setup: Setup, prompt: Prompt, pairs: Sequence[Pair], ask: Ask) -> Verdicts:
    """The verdicts on some pairs under all their principles, or under as many as can matter.

    With a bound B on what a principle's logit can be (``stop_principles_above``) principles are asked in the order of
    their weights, and a pair is asked no further once

        |sum of weight * logit so far| > B * sum of the weights to come,

    because then no verdict within the bound could turn it. It is not asked further either once so many verdicts are
    missing that it is lost.
    """
    bound = setup.config.stop_principles_above
    if bound is None:
        shown = [(principle, *pair) for pair in pairs for principle in setup.principles(prompt, pair)]
        return (yield from _orders(setup, shown, ask))
    labels: list[Label] = []
    totals = {_ids(pair): 0.0 for pair in pairs}
    missing = dict.fromkeys(totals, 0.0)
    whole = left = sum(setup.weights.values())
    for principle in sorted(setup.constitution.principles, key=lambda principle: -principle.weight):
        still = [(principle, *pair) for pair in pairs if _ids(pair) in totals]
        if not still:
            break
        found = yield from _orders(setup, still, ask)
        labels += found
        left -= principle.weight
        logits = {(pair.one, pair.other): pair.principles[principle.id] for pair in setup.pairs(found)[0]}
        for ids in list(totals):
            totals[ids] += principle.weight * logits.get(ids, 0.0)
            missing[ids] += 0.0 if ids in logits else principle.weight
            lost = is_lost(missing[ids] / whole, setup.config.min_principle_weight)
            if lost or abs(totals[ids]) > bound * left:
                del totals[ids]
    return labels


def _ids(pair: Pair) -> tuple[str, str]:
    """As in a pair label: in alphabetical order."""
    one, other = sorted(candidate.candidate_id for candidate in pair)
    return one, other


def _orders(setup: Setup, first: Sequence[Shown], ask: Ask) -> Verdicts:
    """The verdicts on what is shown in both orders, in one, or in the second only where the first is not clear.

    Both orders and all principles of a pair stand close together, so that engines can reuse what they share. Where
    one order may be all there is, chance decides which: else a position bias would always help the same candidates.
    The first order is clear if its logit, less the calibrated position bias, is at least ``second_order_below`` away
    from 0; after one without a verdict the second is not asked, for it would count for nothing.
    """
    config = setup.config
    if config.both_orders and config.second_order_below is None:
        return (yield from ask([order for shown in first for order in (shown, _swapped(shown))]))
    first = [_swapped(shown) if _by_chance(setup.seed, shown) else shown for shown in first]
    labels = yield from ask(first)
    if config.second_order_below is None:
        return labels
    unclear = [
        _swapped(shown)
        for shown, label in zip(first, labels, strict=True)
        if label.p is not None and abs(logit(label.p) - setup.calibration.bias) < config.second_order_below
    ]
    return labels + ((yield from ask(unclear)) if unclear else [])


def _swapped(shown: Shown) -> Shown:
    principle, first, second = shown
    return principle, second, first


def _by_chance(seed: int, shown: Shown) -> bool:
    """A coin that always falls the same way for the same pair, whatever the principle."""
    texts = sorted(candidate.completion for candidate in shown[1:])
    return int(content_hash("order", seed, *texts)[:8], 16) % 2 == (shown[1].completion == texts[0])


def saved(setup: Setup, candidates: int, labels: Sequence[Label]) -> Counter[str]:
    """Verdicts on one prompt that were not asked, by what saved them, against all pairs, orders and principles.

    What was not asked because a verdict is missing has been saved by nothing, and does not count: the second order
    after a first one without a verdict, and the other principles of a pair that is lost.

    Args:
        setup: how they were asked.
        candidates: number of candidates.
        labels: the verdicts that were asked.
    """
    config = setup.config
    orders = 2 if config.both_orders else 1
    principles = len(setup.weights) if config.principles is Principles.each else 1
    asked: dict[frozenset[str | None], dict[str, list[Label]]] = {}
    for label in labels:
        pair = asked.setdefault(frozenset((label.first, label.second)), {})
        pair.setdefault(label.principle, []).append(label)
    result = Counter(
        pairs=(candidates * (candidates - 1) // 2 - len(asked)) * principles * orders, principles=0, second_order=0
    )
    whole = sum(setup.weights.values())
    for by_principle in asked.values():
        sound = [name for name, found in by_principle.items() if all(label.p is not None for label in found)]
        missing = sum(setup.weights[name] for name in by_principle if name not in sound)
        if sound and not is_lost(missing / whole, config.min_principle_weight):
            result["principles"] += (principles - len(by_principle)) * orders
        result["second_order"] += sum(orders - len(by_principle[name]) for name in sound)
    return result
