"""Estimates with their n and 95 % interval."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; ``n`` counts the clusters (prompts) behind it."""

    value: float
    n: int
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float | int | None]:
        """The four keys of this estimate in a metrics file; an infinite bound is ``None``, as JSON has no infinity."""
        return {
            name: round(self.value, 6),
            f"{name}_n": self.n,
            f"{name}_low": round(self.low, 6) if math.isfinite(self.low) else None,
            f"{name}_high": round(self.high, 6) if math.isfinite(self.high) else None,
        }


class ClusteredMean:
    """A mean over clusters (prompts) that takes one number at a time and holds two numbers a cluster.

    Clusters are independent; what lies in one of them need not be.
    """

    def __init__(self) -> None:
        self._sums, self._counts = array("d"), array("d")

    def add(self, value: float, cluster: int) -> None:
        """One observation of a cluster; clusters are numbered from 0 and may be skipped."""
        while len(self._sums) <= cluster:
            self._sums.append(0.0)
            self._counts.append(0.0)
        self._sums[cluster] += value
        self._counts[cluster] += 1

    def estimate(self) -> Estimate | None:
        """The mean with an interval that allows for skewness; None where there is no value.

        Student's t interval after the transformation of Hall (1992, "On the removal of skewness by transformation"),
        on the clusters' deviations from the mean. With one cluster the interval is the whole line.
        """
        sums, counts = self._clusters()
        k = len(sums)
        if not k:
            return None
        mean = float(sums.sum() / counts.sum())
        if k < 2:
            return Estimate(mean, k, float("-inf"), float("inf"))
        deviations = (sums - mean * counts) * k / counts.sum()
        scale = float(np.abs(deviations).max())
        if scale <= 1e-12 * abs(mean):
            # All the same but for rounding.
            return Estimate(mean, k, mean, mean)
        deviations /= scale
        variance = float((deviations**2).mean())
        skewness = float((deviations**3).mean()) / variance**1.5
        error, t = scale * math.sqrt(variance * k / (k - 1)), _student(k - 1) / math.sqrt(k)
        low, high = (mean - error * _less_skewed(q, skewness, k) for q in (t, -t))
        return Estimate(mean, k, low, high)

    def share(self) -> Estimate | None:
        """A share of outcomes in [0, 1] (a tie is 0.5), with an interval within [0, 1] that is never empty.

        Wilson's score interval (1927) for as many independent outcomes as would have this variance between clusters.
        So that clusters which all agree are no certainty, that variance is taken with z^2 / 2 clusters more that have
        nothing but 1, and as many that have nothing but 0 (Agresti and Coull 1998). Where every cluster is one outcome
        of 0 or 1, that number is the number of clusters. With one cluster the interval is [0, 1].
        """
        sums, counts = self._clusters()
        k = len(sums)
        if not k:
            return None
        p, weight, more = float(sums.sum() / counts.sum()), float(counts.mean()), _Z**2 / 2
        if k < 2:
            return Estimate(p, k, 0.0, 1.0)
        centre = (sums.sum() + more * weight) / (counts.sum() + 2 * more * weight)
        spread = float((((sums - centre * counts) / weight) ** 2).sum()) + more * (centre**2 + (1 - centre) ** 2)
        n = centre * (1 - centre) * (k + 2 * more) ** 2 / spread - 2 * more
        return Estimate(p, k, *_wilson(p, float(n)))

    def _clusters(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        sums, counts = np.array(self._sums), np.array(self._counts)
        return sums[counts > 0], counts[counts > 0]


def _wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's score interval (1927): not empty at 0 of n or n of n.

    Centre (p + z^2 / 2n) / (1 + z^2 / n), half width z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n), z = 1.96.
    """
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * math.sqrt(max(0.0, p * (1 - p)) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _less_skewed(q: float, skewness: float, n: int) -> float:
    """The inverse of Hall's transformation of a studentised mean (divided by the root of n) of n deviations."""
    if abs(skewness) < 1e-6:
        return q
    return 3 / skewness * (math.cbrt(1 + skewness * (q - skewness / (6 * n))) - 1)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t to half a percent: exact for 1 and 2, else its series in 1 / freedom."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    z, v = _Z, freedom
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Any] | None = None, least: float = float("-inf")
) -> Estimate | None:
    """Mean of ``values`` with its interval (:meth:`ClusteredMean.estimate`); None where there are no values.

    Args:
        values: one number an observation.
        clusters: the cluster (prompt) of each observation; without it each observation is its own.
        least: what no value can be below, and so no end of the interval of several clusters.
    """
    estimate = _gathered(values, clusters).estimate()
    if estimate is None or estimate.n < 2:
        return estimate
    return replace(estimate, low=max(least, estimate.low))


def clustered_share(values: Sequence[float], clusters: Sequence[Any] | None = None) -> Estimate | None:
    """Share of outcomes in [0, 1] with its interval (:meth:`ClusteredMean.share`); None where there are none."""
    return _gathered(values, clusters).share()


def clustered_difference(gains: Sequence[float], clusters: Sequence[Any] | None = None) -> Estimate | None:
    """Mean of differences between outcomes in [0, 1], with the interval of the share (1 + gain) / 2: never empty."""
    share = clustered_share([(1 + gain) / 2 for gain in gains], clusters)
    return share and Estimate(2 * share.value - 1, share.n, 2 * share.low - 1, 2 * share.high - 1)


def _gathered(values: Sequence[float], clusters: Sequence[Any] | None) -> ClusteredMean:
    mean = ClusteredMean()
    order: dict[Any, int] = {}
    for value, name in zip(values, range(len(values)) if clusters is None else clusters, strict=True):
        mean.add(value, order.setdefault(name, len(order)))
    return mean


@dataclass(frozen=True)
class Gain:
    """What one row scores above another on the same prompts, and how often it is the better one."""

    gain: Estimate
    win_rate: Estimate


def paired_gain(scores: Sequence[float], others: Sequence[float], prompts: Sequence[Any]) -> Gain | None:
    """Mean paired difference, and the share of pairs that the first side wins; a tie counts half.

    Args:
        scores: of one side's completions.
        others: of the other's, in the same order.
        prompts: the prompt of each pair.
    """
    gains = [left - right for left, right in zip(scores, others, strict=True)]
    gain = clustered_mean(gains, prompts)
    win_rate = clustered_share([0.5 if gain == 0 else float(gain > 0) for gain in gains], prompts)
    return None if gain is None or win_rate is None else Gain(gain, win_rate)


def expected_calibration_error(p: Sequence[float], outcome: Sequence[float], bins: int = 10) -> float | None:
    """Mean gap between confidence and frequency over equal-width bins (Guo et al. 2017, eq. 3).

    Args:
        p: predicted probabilities.
        outcome: what happened, in [0, 1] (a soft outcome counts as its probability).
        bins: number of bins on [0, 1].
    """
    if not len(p):
        return None
    predicted, happened = np.asarray(p, float), np.asarray(outcome, float)
    place = np.minimum((predicted * bins).astype(int), bins - 1)
    gap = 0.0
    for number in range(bins):
        inside = place == number
        if inside.any():
            gap += inside.mean() * abs(predicted[inside].mean() - happened[inside].mean())
    return float(gap)


def pairs_agreement(logits: Sequence[float], truth: Sequence[float]) -> list[float]:
    """1 where the sign of the logit is that of the truth, 0 where not, 0.5 for a logit of 0; true ties left out."""
    return [
        0.5 if logit == 0 else float((logit > 0) == (true > 0))
        for logit, true in zip(logits, truth, strict=True)
        if true != 0
    ]


def fit_temperature(margins: Sequence[float], labels: Sequence[float]) -> float:
    """The T that minimises the soft negative log-likelihood of sigmoid(margin / T) (Guo et al. 2017).

    Golden-section search over log T in [-4, 4]; the loss is unimodal in T. Where margins say nothing of the labels,
    T is the upper end of that range.
    """
    m, p = np.asarray(margins, np.float64), np.asarray(labels, np.float64)

    def loss(log_t: float) -> float:
        scaled = m / math.exp(log_t)
        return float((p * np.logaddexp(0, -scaled) + (1 - p) * np.logaddexp(0, scaled)).mean())

    low, high, ratio = -4.0, 4.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return round(math.exp((low + high) / 2), 4)
