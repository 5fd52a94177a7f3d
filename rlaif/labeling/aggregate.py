"""Combining verdicts into soft labels of pairs. Pure arithmetic on labels."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlaif.records import Label

# Verdicts at the ends of the scale are as certain as float16 can say, not infinitely so.
EPSILON = 1e-6


@dataclass(frozen=True)
class PairLabel:
    """What the labeler thinks of one unordered pair: ``logit`` of P(one is better than other)."""

    prompt_id: str
    one: str
    other: str
    logit: float
    principles: dict[str, float]

    @property
    def p(self) -> float:
        """P(one is better than other)."""
        return sigmoid(self.logit)


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def logit(p: float) -> float:
    """log(p / (1 - p)), with p clipped to [1e-6, 1 - 1e-6]."""
    p = min(max(p, EPSILON), 1 - EPSILON)
    return math.log(p / (1 - p))


def unswap(label: Label) -> tuple[str, str, float | None]:
    """A pairwise verdict as (one, other, logit that one is better), with one < other by id.

    An invalid verdict stays invalid.
    """
    assert label.first is not None
    assert label.second is not None
    value = None if label.p is None else logit(label.p)
    if label.first < label.second:
        return label.first, label.second, value
    return label.second, label.first, None if value is None else -value


def pair_labels(
    labels: Iterable[Label],
    weights: Mapping[str, float],
    temperature: float = 1.0,
    both_orders: bool = True,
) -> tuple[list[PairLabel], dict[str, int]]:
    """Soft labels of pairs from verdicts, all of one mode.

    Pairwise: logits of the two orders are averaged, which cancels an additive position bias exactly; a pair with
    a missing order is dropped. Listwise: :func:`list_logits`, averaged over the orders of the list in the same way.
    Otherwise :func:`point_logit` of the two completions' labels. Principles are averaged by weight; a pair counts only
    if every principle that it was asked under has its verdict.

    Args:
        labels: verdicts of one labeler.
        weights: weight of each principle, asked or not.
        temperature: divides the combined logit.
        both_orders: whether each pair was asked in both orders.

    Returns:
        The pair labels in the order of the first verdict on each pair, and counts of dropped pairs by reason.
    """
    logits: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    points: dict[str, dict[str, dict[str, Label]]] = defaultdict(dict)
    orders: int | None = 2 if both_orders else 1
    for label in labels:
        if label.order is not None:
            orders = None  # as many as it has labels
            for one, other, value in list_logits(label):
                by_principle = logits.setdefault((label.prompt_id, one, other), defaultdict(list))
                by_principle[label.principle].append(value)
        elif label.candidate is not None:
            points[label.prompt_id].setdefault(label.candidate, {})[label.principle] = label
        else:
            one, other, value = unswap(label)
            by_principle = logits.setdefault((label.prompt_id, one, other), defaultdict(list))
            by_principle[label.principle].append(value)
    combined: dict[tuple[str, str, str], dict[str, float | None]] = {
        pair: {principle: _mean(values, orders or len(values)) for principle, values in by_principle.items()}
        for pair, by_principle in logits.items()
    }
    for prompt_id, candidates in points.items():
        for one, other in itertools.combinations(sorted(candidates), 2):
            left, right = candidates[one], candidates[other]
            combined[prompt_id, one, other] = {
                principle: point_logit(left[principle], right[principle])
                if principle in left and principle in right
                else None
                for principle in left | right
            }
    return _weigh(combined, weights, temperature)


def _mean(values: Sequence[float | None], expected: int) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / expected if len(found) == expected else None


def list_logits(label: Label) -> Iterator[tuple[str, str, float | None]]:
    """(one, other, logit that one is better) of every pair in a listwise verdict, with one < other by id.

    The logit is log p(one) - log p(other), with p the probability of being chosen as the best: by Luce's choice axiom
    (Luce 1959; the first choice of Plackett-Luce) the odds of two do not depend on the others in the list.
    Probabilities are clipped from below to 1e-6. An invalid verdict stays invalid.
    """
    assert label.order is not None
    places = {name: place for place, name in enumerate(label.order)}
    for one, other in itertools.combinations(sorted(places), 2):
        if label.probs is None:
            yield one, other, None
        else:
            left, right = (max(label.probs[places[name]], EPSILON) for name in (one, other))
            yield one, other, math.log(left) - math.log(right)


def point_logit(left: Label, right: Label) -> float | None:
    """Logit that the completion of ``left`` is better than that of ``right``, each judged by itself.

    Pointwise: the difference of their logits. Score: logit of :func:`p_higher` of their distributions. Contrastive:
    the difference of their log-likelihood ratios, which are log-odds for the encouraging prompt already.
    """
    if left.verdict is None or right.verdict is None:
        return None
    if left.probs is not None and right.probs is not None:
        return logit(p_higher(left.probs, right.probs))
    if left.p is not None and right.p is not None:
        return logit(left.p) - logit(right.p)
    assert left.score is not None
    assert right.score is not None
    return left.score - right.score


def p_higher(left: Sequence[float], right: Sequence[float]) -> float:
    """P(X > Y) + P(X = Y) / 2 of independent X and Y with these distributions over the same scale.

    It is a preference already, uses the scale's order alone (that 9 is one more than 8 means nothing to a labeler), and
    knows how sure the labeler was: means of 6 and 7 say little where both distributions are wide, and the logit
    of a mean, (E - 1) / 9, would not show it.
    """
    pairs = list(itertools.product(enumerate(left), enumerate(right)))
    # Exactly 1/2 for equal distributions: fsum does not depend on the order of what it adds.
    above = math.fsum(p * q for (x, p), (y, q) in pairs if x > y)
    below = math.fsum(p * q for (x, p), (y, q) in pairs if x < y)
    return (1 + (above - below)) / 2


def _weigh(
    combined: Mapping[tuple[str, str, str], Mapping[str, float | None]],
    weights: Mapping[str, float],
    temperature: float,
) -> tuple[list[PairLabel], dict[str, int]]:
    result, dropped = [], {"no_verdict": 0}
    for (prompt_id, one, other), by_principle in combined.items():
        valid = {principle: value for principle, value in by_principle.items() if value is not None}
        if len(valid) < len(by_principle):
            dropped["no_verdict"] += 1
            continue
        total = sum(weights[principle] for principle in valid)
        mean = sum(weights[principle] * value for principle, value in valid.items()) / total
        result.append(PairLabel(prompt_id, one, other, mean / temperature, valid))
    return result, dropped
