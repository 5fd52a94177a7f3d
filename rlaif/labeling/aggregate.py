"""Combining verdicts into soft labels of pairs. Pure arithmetic on labels."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlaif.config import LabelingConfig
from rlaif.records import Label

# Verdicts at the ends of the scale are as certain as float16 can say, not infinitely so.
EPSILON = 1e-6
TIE = 1e-9
"""Logits closer to 0 are a tie: rounding must not choose between two completions."""


@dataclass(frozen=True)
class PairLabel:
    """What the labeler thinks of one unordered pair: ``logit`` of P(one is better than other).

    ``principles`` has the logit under each principle that has its verdicts, before any temperature.
    ``missing_weight``: the share of the weight of all principles asked that is without. ``inferred``: there is no
    verdict on this very pair (all of the weight is missing); the logit follows from those on others.
    """

    prompt_id: str
    one: str
    other: str
    logit: float
    principles: dict[str, float]
    inferred: bool = False
    missing_weight: float = 0.0

    @property
    def p(self) -> float:
        """P(one is better than other)."""
        return sigmoid(self.logit)


@dataclass(frozen=True)
class Calibration:
    """P(one is better than other) = sigmoid(logit / temperature), or sigmoid((logit - bias) / single_temperature).

    The second is for pairwise verdicts in a single order, with the logit of the completion shown first; the first for
    all other labels, for instance those of both orders, where the bias has cancelled.
    """

    temperature: float = 1.0
    bias: float = 0.0
    single_temperature: float = 1.0


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def or_tie(x: float) -> float:
    """A pair's logit, 0 where only rounding keeps it from being 0."""
    return 0.0 if abs(x) < TIE else x


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


def combine(
    labels: Iterable[Label],
    weights: Mapping[str, float],
    config: LabelingConfig,
    calibration: Calibration | None = None,
) -> tuple[list[PairLabel], dict[str, int]]:
    """:func:`pair_labels` of verdicts that were asked as ``config`` says."""
    return pair_labels(
        labels,
        weights,
        config.temperature,
        both_orders=config.both_orders and config.second_order_below is None,
        all_principles=config.stop_principles_above is None,
        calibration=calibration,
        min_weight=config.min_principle_weight,
    )


def pair_labels(
    labels: Iterable[Label],
    weights: Mapping[str, float],
    temperature: float = 1.0,
    both_orders: bool = True,
    all_principles: bool = True,
    calibration: Calibration | None = None,
    min_weight: float = 1.0,
) -> tuple[list[PairLabel], dict[str, int]]:
    """Soft labels of pairs from verdicts, all of one mode.

    Pairwise: logits of the two orders are averaged, which cancels an additive position bias exactly; from the logit of
    a single order the calibrated bias is subtracted. A principle with a missing order has no say. Listwise:
    :func:`list_logits`, averaged over the orders of the list in the same way. Otherwise :func:`point_logit` of the two
    completions' labels; a principle under which either is missing has no say. The principles that have one are
    averaged by weight.

    Args:
        labels: verdicts of one labeler.
        weights: weight of each principle, asked or not.
        temperature: divides the combined logit.
        both_orders: whether a principle needs both orders; else one is enough, but none that was asked may be missing.
        all_principles: the principles that were asked are all that count; else the others count as undecided (logit 0).
        calibration: its temperature divides the combined logit too.
        min_weight: a pair is dropped if the principles that have no say have more than 1 - this of the weight.

    Returns:
        The pair labels in the order of the first verdict on each pair, and counts of dropped pairs by reason.
    """
    calibration = calibration or Calibration()
    logits: dict[tuple[str, str, str], dict[str, list[float | None]]] = {}
    points: dict[str, dict[str, dict[str, Label]]] = defaultdict(dict)
    pairwise = False
    for label in labels:
        if label.order is not None:
            for one, other, value in list_logits(label):
                by_principle = logits.setdefault((label.prompt_id, one, other), defaultdict(list))
                by_principle[label.principle].append(value)
        elif label.candidate is not None:
            points[label.prompt_id].setdefault(label.candidate, {})[label.principle] = label
        else:
            pairwise = True
            one, other, value = unswap(label)
            # In the mean of both orders the two cancel.
            bias = calibration.bias if one == label.first else -calibration.bias
            by_principle = logits.setdefault((label.prompt_id, one, other), defaultdict(list))
            by_principle[label.principle].append(None if value is None else value - bias)
    needed = 2 if pairwise and both_orders else 1
    combined: dict[tuple[str, str, str], dict[str, float | None]] = {
        pair: {principle: _mean(values, needed) for principle, values in by_principle.items()}
        for pair, by_principle in logits.items()
    }
    # A pair is as sure as its least sure part.
    single = {
        pair
        for pair, asked in logits.items()
        if pairwise and any(len(asked[name]) == 1 for name, value in combined[pair].items() if value is not None)
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
    temperatures = {
        pair: temperature * (calibration.single_temperature if pair in single else calibration.temperature)
        for pair in combined
    }
    return _weigh(combined, weights, temperatures, None if all_principles else sum(weights.values()), min_weight)


def _mean(values: Sequence[float | None], needed: int) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if len(found) == len(values) >= needed else None


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
    of a mean, (E - 1) / 8, would not show it.
    """
    pairs = list(itertools.product(enumerate(left), enumerate(right)))
    # Exactly 1/2 for equal distributions: fsum does not depend on the order of what it adds.
    above = math.fsum(p * q for (x, p), (y, q) in pairs if x > y)
    below = math.fsum(p * q for (x, p), (y, q) in pairs if x < y)
    return (1 + (above - below)) / 2


def is_lost(missing_weight: float, min_weight: float) -> bool:
    """Whether a pair has no label: principles with so large a share of the weight are without their verdicts."""
    return missing_weight > 1 - min_weight + TIE


def _weigh(
    combined: Mapping[tuple[str, str, str], Mapping[str, float | None]],
    weights: Mapping[str, float],
    temperatures: Mapping[tuple[str, str, str], float],
    total: float | None,
    min_weight: float,
) -> tuple[list[PairLabel], dict[str, int]]:
    """The mean over principles; ``total`` is what their weights add up to, or None for that of those asked."""
    result, dropped = [], {"no_verdict": 0}
    for pair, by_principle in combined.items():
        valid = {principle: value for principle, value in by_principle.items() if value is not None}
        missing = sum(weights[principle] for principle in by_principle if principle not in valid)
        present = sum(weights[principle] for principle in valid)
        if total is not None:
            # What was not asked is undecided, not missing.
            present = total - missing
        share = missing / (present + missing)
        if not valid or is_lost(share, min_weight):
            reason = "missing_weight" if valid else "no_verdict"
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        mean = sum(weights[principle] * value for principle, value in valid.items()) / present
        result.append(PairLabel(*pair, or_tie(mean / temperatures[pair]), valid, missing_weight=share))
    return result, dropped
