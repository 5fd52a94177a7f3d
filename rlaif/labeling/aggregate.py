"""Combining verdicts into soft labels of pairs. Pure arithmetic on labels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlaif.records import Label

# Verdicts at the ends of the scale are as certain as float16 can say, not infinitely so.
_EPSILON = 1e-6


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
    p = min(max(p, _EPSILON), 1 - _EPSILON)
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
    """Soft labels of pairs from verdicts.

    Pairwise: logits of the two orders are averaged, which cancels an additive position bias exactly; a pair with
    a missing order is dropped. Pointwise: the difference of the two completions' logits. Principles are averaged
    by weight; a pair counts only if every principle has its verdict.

    Args:
        labels: verdicts of one labeler.
        weights: weight of each principle.
        temperature: divides the combined logit.
        both_orders: whether each pair was asked in both orders.

    Returns:
        The pair labels in the order of the first verdict on each pair, and counts of dropped pairs by reason.
    """
    logits: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    points: dict[str, dict[str, dict[str, float | None]]] = defaultdict(dict)
    for label in labels:
        if label.mode == "pairwise":
            one, other, value = unswap(label)
            by_principle = logits.setdefault((label.prompt_id, one, other), defaultdict(list))
            by_principle[label.principle].append(value)
        else:
            assert label.candidate is not None
            scores = points[label.prompt_id].setdefault(label.candidate, {})
            scores[label.principle] = None if label.p is None else logit(label.p)
    expected = 2 if both_orders else 1
    combined: dict[tuple[str, str, str], dict[str, float | None]] = {}
    for pair, by_principle in logits.items():
        combined[pair] = {
            principle: sum(found) / expected if len(found) == expected else None
            for principle, values in by_principle.items()
            for found in [[value for value in values if value is not None]]
        }
    for prompt_id, candidates in points.items():
        combined |= _point_differences(prompt_id, candidates, list(weights))
    return _weigh(combined, weights, temperature)


def _point_differences(
    prompt_id: str, candidates: Mapping[str, Mapping[str, float | None]], principles: Sequence[str]
) -> dict[tuple[str, str, str], dict[str, float | None]]:
    names = sorted(candidates)
    result = {}
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            difference: dict[str, float | None] = {}
            for principle in principles:
                left, right = candidates[one].get(principle), candidates[other].get(principle)
                difference[principle] = None if left is None or right is None else left - right
            result[prompt_id, one, other] = difference
    return result


def _weigh(
    combined: Mapping[tuple[str, str, str], Mapping[str, float | None]],
    weights: Mapping[str, float],
    temperature: float,
) -> tuple[list[PairLabel], dict[str, int]]:
    total = sum(weights.values())
    result, dropped = [], {"no_verdict": 0}
    for (prompt_id, one, other), by_principle in combined.items():
        values = {principle: by_principle.get(principle) for principle in weights}
        valid = {principle: value for principle, value in values.items() if value is not None}
        if len(valid) < len(weights):
            dropped["no_verdict"] += 1
            continue
        mean = sum(weights[principle] * value for principle, value in valid.items()) / total
        result.append(PairLabel(prompt_id, one, other, mean / temperature, valid))
    return result, dropped
