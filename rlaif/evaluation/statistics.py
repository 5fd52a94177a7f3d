"""Estimates with their n and 95 % interval."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile-bootstrap 95 % interval; ``n`` counts the clusters that were resampled."""

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


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Any] | None = None, resamples: int = 2000, seed: int = 0
) -> Estimate | None:
    """Mean of ``values``, with an interval that resamples whole clusters (prompts).

    Args:
        values: one number an observation.
        clusters: the cluster of each observation; without it each observation is its own.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        The estimate, or None where there are no values. With one cluster the interval is the whole line.
    """
    if not len(values):
        return None
    mean = ClusteredMean()
    if clusters is None:
        clusters = range(len(values))
    order: dict[Any, int] = {}
    for value, name in zip(values, clusters, strict=True):
        mean.add(value, order.setdefault(name, len(order)))
    return mean.estimate(resamples, seed)


def proportion(values: Sequence[float]) -> Estimate | None:
    """Share of independent outcomes in [0, 1], with its score interval (Wilson 1927): not empty at 0 of n or n of n.

    Centre (p + z^2 / 2n) / (1 + z^2 / n), half width z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n), z = 1.96.
    """
    n = len(values)
    if not n:
        return None
    p, z = sum(values) / n, 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Estimate(p, n, max(0.0, centre - half), min(1.0, centre + half))


def clustered_share(values: Sequence[float], clusters: Sequence[Any]) -> Estimate | None:
    """Share of outcomes in [0, 1] that come in clusters, with an interval that is never empty and within [0, 1].

    The bootstrap has nothing to resample where all outcomes agree. So where every cluster has one outcome the interval
    is that of :func:`proportion`; else it is the hull of the bootstrap's and of :func:`proportion`'s on cluster means.
    """
    groups: dict[Any, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        groups.setdefault(cluster, []).append(value)
    wilson = proportion([sum(group) / len(group) for group in groups.values()])
    bootstrap = bootstrap_mean(values, clusters)
    if wilson is None or bootstrap is None or len(groups) == len(values):
        return wilson
    low, high = max(0.0, min(wilson.low, bootstrap.low)), min(1.0, max(wilson.high, bootstrap.high))
    return Estimate(bootstrap.value, bootstrap.n, low, high)


_MOST_CLUSTERS = 10_000
_AT_ONCE = 16
"""Resamples drawn at once: so many clusters of so many take 4 megabytes."""


class ClusteredMean:
    """A mean over clusters that takes one number at a time and holds two numbers a cluster.

    Beyond 10,000 clusters they are dealt in turn into 10,000 groups, and the groups are resampled: clusters are
    independent, so groups of them are too, and so many tell the spread of a mean as well.
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

    def estimate(self, resamples: int = 2000, seed: int = 0) -> Estimate | None:
        """The mean with its interval; None where there is no value."""
        sums, counts = np.array(self._sums), np.array(self._counts)
        sums, counts = sums[counts > 0], counts[counts > 0]
        n = len(sums)
        if not n:
            return None
        mean = float(sums.sum() / counts.sum())
        if n < 2:
            return Estimate(mean, n, float("-inf"), float("inf"))
        groups = np.arange(n) % _MOST_CLUSTERS
        sums, counts = np.bincount(groups, weights=sums), np.bincount(groups, weights=counts)
        generator = np.random.default_rng(seed)
        means = np.empty(resamples)
        for start in range(0, resamples, _AT_ONCE):
            draws = generator.integers(0, len(sums), size=(min(_AT_ONCE, resamples - start), len(sums)))
            means[start : start + len(draws)] = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        return Estimate(mean, n, float(low), float(high))


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
