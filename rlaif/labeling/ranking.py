"""Rankings from pair labels: Bradley-Terry scores, and which pair to ask next. Pure arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import numpy as np

from rlaif.labeling.aggregate import TIE, PairLabel, or_tie

RIDGE = 1e-3
"""Precision of the prior on scores, N(0, 1 / RIDGE): weak, but scores stay finite where one candidate always wins."""
NOISE = 1.0
"""Standard deviation, in logits, that a pair's label is taken to have around the difference of the two scores."""
CLEAR = 4.0
"""Beyond so many logits a label says that one is better, but hardly by how much (it saturates)."""
DOUBT = 0.05
"""A pair counts as ordered once the fitted order is wrong with at most this probability."""

T = TypeVar("T")
Verdict = tuple[int, int, float]
"""(i, j, logit that i is better than j)."""


def bradley_terry(count: int, verdicts: Sequence[Verdict], ridge: float = RIDGE) -> list[float]:
    """Scores s with P(i is better than j) = sigmoid(s_i - s_j) (Bradley and Terry 1952), for soft verdicts.

    Minimises, over the verdicts p = sigmoid(logit),

        -sum [p log sigmoid(s_i - s_j) + (1 - p) log sigmoid(s_j - s_i)] + ridge / 2 * sum s^2

    by Newton's method with step halving. The loss is strictly convex, so the scores are unique; they sum to 0.

    Args:
        count: number of candidates.
        verdicts: any pairs of them, any number of times.
        ridge: precision of the prior.
    """
    if not verdicts:
        return [0.0] * count
    one = np.array([i for i, _, _ in verdicts])
    other = np.array([j for _, j, _ in verdicts])
    target = _sigmoid(np.array([logit for _, _, logit in verdicts]))

    def loss(at: np.ndarray) -> float:
        d = at[one] - at[other]
        return float(np.logaddexp(0, d).sum() - (target * d).sum() + ridge / 2 * (at @ at))

    scores = np.zeros(count)
    value = loss(scores)
    for _ in range(100):
        p = _sigmoid(scores[one] - scores[other])
        gradient = ridge * scores
        gradient += np.bincount(one, p - target, count) - np.bincount(other, p - target, count)
        if np.abs(gradient).max() < 1e-10:
            break
        step = np.linalg.solve(_laplacian(count, one, other, p * (1 - p)) + ridge * np.eye(count), gradient)
        size = 1.0
        while (new := loss(scores - size * step)) > value and size > 1e-6:
            size /= 2
        if new > value:
            break
        scores, value = scores - size * step, new
    return [float(score) for score in scores]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _laplacian(count: int, one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum over pairs of weight * (e_i - e_j)(e_i - e_j)^T."""
    places = np.concatenate([one * count + other, other * count + one])
    between = np.bincount(places, np.concatenate([weights, weights]), count**2).reshape(count, count)
    return np.diag(between.sum(1)) - between


def doubts(count: int, verdicts: Sequence[Verdict], noise: float = NOISE, ridge: float = RIDGE) -> np.ndarray:
    """Probability that the fitted order of a pair is wrong, [count, count]: Phi(-|s_i - s_j| / sd_ij).

    The scores are fitted to the verdicts clipped to [-CLEAR, CLEAR]. ``sd_ij`` is the posterior deviation of
    s_i - s_j if a verdict is that difference plus Gaussian noise: noise times the square root of the effective
    resistance between i and j in the graph of the verdicts, up to the ridge. Without a path between two candidates the
    doubt is close to 1/2.
    """
    clipped = [(i, j, min(max(logit, -CLEAR), CLEAR)) for i, j, logit in verdicts]
    scores = np.array(bradley_terry(count, clipped, ridge))
    one, other = (np.array([verdict[side] for verdict in verdicts], int) for side in (0, 1))
    precision = _laplacian(count, one, other, np.full(len(verdicts), noise**-2)) + ridge * np.eye(count)
    covariance = np.linalg.inv(precision)
    own = np.diag(covariance)
    variance = own[:, None] + own[None, :] - 2 * covariance
    z = np.abs(scores[:, None] - scores[None, :]) / np.sqrt(2 * np.maximum(variance, 1e-12))
    return np.array([math.erfc(value) / 2 for value in z.flat]).reshape(z.shape)


def uncertain_pairs(
    count: int, verdicts: Sequence[Verdict], asked: Collection[tuple[int, int]], limit: int | None = None
) -> list[tuple[int, int]]:
    """The pairs to ask next; none once every pair that is left is certain (``DOUBT``).

    First what connects candidates that no chain of verdicts connects yet, for their scores cannot be compared; then the
    most doubtful pairs: uncertainty sampling (Lewis and Gale 1994) over orders, which leaves out what the verdicts so
    far imply (Jamieson and Nowak 2011). The pairs of one round share no candidate and close no circle, because one
    verdict on a candidate changes the doubt about its other pairs.

    Args:
        count: number of candidates.
        verdicts: what is known.
        asked: pairs (i, j), i < j, that are not asked again.
        limit: at most so many.
    """
    doubt = doubts(count, verdicts)
    known = groups(range(count), [(i, j) for i, j, _ in verdicts])
    open_pairs = [pair for pair in itertools.combinations(range(count), 2) if pair not in asked]
    # Rounding must not decide between pairs that are equally doubtful.
    open_pairs.sort(key=lambda pair: (known[pair[0]] == known[pair[1]], -round(float(doubt[pair]), 9), pair))
    result: list[tuple[int, int]] = []
    for pair in open_pairs:
        if limit is not None and len(result) == limit:
            break
        if any(set(pair) & set(other) for other in result):
            continue
        one, other = known[pair[0]], known[pair[1]]
        if one == other:
            wanted = bool(doubt[pair] > DOUBT)
        else:
            linked = groups(known.values(), [(known[i], known[j]) for i, j in result])
            wanted = linked[one] != linked[other]
        if wanted:
            result.append(pair)
    return result


def groups(names: Iterable[T], links: Iterable[tuple[T, T]]) -> dict[T, T]:
    """Which of these are connected by links: those of one group have the same value."""
    result = {name: name for name in names}
    for one, other in links:
        old, new = result[other], result[one]
        result = {name: new if root == old else root for name, root in result.items()}
    return result


def scores_of(pairs: Sequence[PairLabel]) -> dict[str, float]:
    """Bradley-Terry scores of the candidates of one prompt that have a pair label, by id; one pair needs no fit."""
    if len(pairs) == 1:
        return {pairs[0].one: pairs[0].logit / 2, pairs[0].other: -pairs[0].logit / 2}
    names = sorted({name for pair in pairs for name in (pair.one, pair.other)})
    place = {name: number for number, name in enumerate(names)}
    found = bradley_terry(len(names), [(place[pair.one], place[pair.other], pair.logit) for pair in pairs])
    return dict(zip(names, found, strict=True))


def ranks(scores: dict[str, float]) -> dict[str, int]:
    """1 for the best; candidates with equal scores (to 1e-9) share the better rank."""
    return {name: 1 + sum(other > score + TIE for other in scores.values()) for name, score in scores.items()}


def ranked_pairs(prompt_id: str, names: Sequence[str], pairs: Sequence[PairLabel]) -> tuple[list[PairLabel], int]:
    """Labels of all pairs of a prompt from the scores that its pair labels fit: logit = s_i - s_j.

    A pair without a label of its own is marked as inferred, and has no breakdown by principle. Scores of candidates
    that no chain of labels connects cannot be compared: such pairs have no label.

    Args:
        prompt_id: of all of them.
        names: ids of all candidates.
        pairs: the labels that there are.

    Returns:
        The labels, and the number of pairs without one.
    """
    scores = scores_of(pairs)
    own = {(pair.one, pair.other): pair for pair in pairs}
    group = groups(names, own)
    result, unconnected = [], 0
    for one, other in itertools.combinations(sorted(names), 2):
        if group[one] != group[other]:
            unconnected += 1
            continue
        known = own.get((one, other))
        breakdown, missing = (known.principles, known.missing_weight) if known else ({}, 1.0)
        logit = or_tie(scores[one] - scores[other])
        result.append(PairLabel(prompt_id, one, other, logit, breakdown, known is None, missing))
    return result, unconnected
