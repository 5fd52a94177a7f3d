"""What a labeler's logits are worth: position bias and temperature, measured on pairs that people have labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaif.evaluation.statistics import Estimate
from rlaif.labeling.aggregate import Calibration, pair_labels
from rlaif.labeling.audit import FIRST, SECOND, Comparison
from rlaif.records import Label, UserError, read_json

FILE = "calibration.json"


@dataclass(frozen=True)
class Fit:
    """sigmoid((logit - bias) / temperature), with slope = 1 / temperature; no ``bias`` where it is 0 by design."""

    slope: Estimate
    temperature: Estimate
    bias: Estimate | None


def fit(
    logits: Sequence[float],
    choices: Sequence[bool],
    clusters: Sequence[str],
    with_bias: bool,
    resamples: int = 1000,
    seed: int = 0,
) -> Fit:
    """Logistic regression of people's choice on the labeler's logit (Platt 1999), by Newton's method.

    The targets are Platt's, (n + 1) / (n + 2) and 1 / (n + 2) with n choices of a kind, so that the slope is finite
    also where the labeler is always right. Intervals are percentile bootstraps over clusters, at most 1,000 resamples.

    Args:
        logits: the labeler's, for the completion shown first.
        choices: whether people preferred that completion.
        clusters: the prompt of each.
        with_bias: fit a bias too; else each row counts in both orders, and there is none.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Slope, temperature (infinite where the slope is not above 0) and bias, each with its interval.
    """
    x, won = np.asarray(logits, float), np.asarray(choices, bool)
    if not with_bias:
        x, won = np.concatenate([x, -x]), np.concatenate([won, ~won])
        clusters = [*clusters, *clusters]
    names, place = np.unique(np.asarray(clusters), return_inverse=True)
    slope, offset = _logistic(x, won, np.ones(len(x)))
    generator = np.random.default_rng(seed)
    drawn = np.empty((resamples, 2))
    for number in range(resamples):
        counts = np.bincount(generator.integers(0, len(names), len(names)), minlength=len(names))
        drawn[number] = _logistic(x, won, counts[place].astype(float))

    def estimate(value: float, values: np.ndarray) -> Estimate:
        low, high = np.percentile(values, [2.5, 97.5])
        return Estimate(value, len(names), float(low), float(high))

    slopes = estimate(slope, drawn[:, 0])
    temperature = Estimate(_inverse(slope), len(names), _inverse(slopes.high), _inverse(slopes.low))
    bias = None
    if with_bias:
        bias = estimate(-offset / slope if slope else 0.0, -drawn[:, 1] / np.where(drawn[:, 0] == 0, 1, drawn[:, 0]))
    return Fit(slopes, temperature, bias)


def _inverse(slope: float) -> float:
    return 1 / slope if slope > 0 else float("inf")


def _logistic(x: np.ndarray, won: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Slope and offset that maximise the likelihood of Platt's targets, each row ``counts`` times."""
    wins = counts[won].sum()
    losses = counts.sum() - wins
    target = np.where(won, (wins + 1) / (wins + 2), 1 / (losses + 2))
    design = np.stack([x, np.ones_like(x)], axis=1)

    def loss(at: np.ndarray) -> float:
        z = design @ at
        # The tiny ridge decides where all logits are equal.
        return float((counts * (np.logaddexp(0, z) - target * z)).sum() + 1e-6 * (at @ at))

    at, value = np.zeros(2), float("inf")
    for _ in range(100):
        p = np.exp(-np.logaddexp(0, -(design @ at)))
        gradient = design.T @ (counts * (p - target)) + 2e-6 * at
        if np.abs(gradient).max() < 1e-8 * max(1.0, counts.sum()):
            break
        step = np.linalg.solve((design.T * (counts * p * (1 - p))) @ design + 2e-6 * np.eye(2), gradient)
        value, size = loss(at), 1.0
        while (new := loss(at - size * step)) > value and size > 1e-6:
            size /= 2
        if new > value:
            break
        at = at - size * step
    return float(at[0]), float(at[1])


def measure(
    labeler: str,
    comparisons: Sequence[Comparison],
    labels: Sequence[Label],
    weights: Mapping[str, float],
    min_weight: float = 1.0,
) -> tuple[Calibration, dict[str, Any]]:
    """What to apply to a labeler's labels, from its verdicts on pairs that people have labelled.

    Two fits: of the labels of both orders (or pointwise), and of single orders as shown, which have a bias and more
    noise. Pairs on which people took no side, or the labeler gave no verdict, are left out.

    Args:
        labeler: for messages.
        comparisons: what people said.
        labels: the labeler's verdicts on them, in both orders.
        weights: of the principles.
        min_weight: as for :func:`pair_labels`.

    Returns:
        The calibration, and the record of it for ``calibration.json``: flat, with n (prompts) and intervals.

    Raises:
        UserError: if a slope is not clearly above 0.
    """
    sides = {comparison.name: comparison for comparison in comparisons if comparison.truth}

    def fitted(chosen: Sequence[Label], first: str, single: bool) -> tuple[list[float], list[bool], list[str]]:
        """Logits of the completion called ``first``, whether people preferred it, and the prompts."""
        pairs, _ = pair_labels(chosen, weights, both_orders=not single, min_weight=min_weight)
        rows = [(pair, sides[pair.prompt_id]) for pair in pairs if pair.prompt_id in sides]
        return (
            [pair.logit if pair.one == first else -pair.logit for pair, _ in rows],
            [(comparison.truth > 0) == (first == FIRST) for _, comparison in rows],
            [comparison.prompt.prompt_id for _, comparison in rows],
        )

    fits = {"": fitted(labels, FIRST, single=False)}
    if any(label.first for label in labels):
        shown = [fitted([label for label in labels if label.first == side], side, True) for side in (FIRST, SECOND)]
        fits["single_"] = shown[0][0] + shown[1][0], shown[0][1] + shown[1][1], shown[0][2] + shown[1][2]
    record: dict[str, Any] = {"labeler": labeler}
    found: dict[str, float] = {}
    for name, (logits, choices, prompts) in fits.items():
        if not logits:
            raise UserError(f"labeling.calibrate: {labeler} gave no verdict on any pair on which people took a side")
        of = fit(logits, choices, prompts, with_bias=bool(name))
        if of.slope.low <= 0:
            raise UserError(
                f"labeling.calibrate: the logits of {labeler} do not clearly follow people's choices on these "
                f"{of.slope.n} prompts (slope {of.slope.value:.3f} [{of.slope.low:.3f}, {of.slope.high:.3f}]), so "
                "there is nothing to calibrate; use another labeler, or more pairs"
            )
        record |= of.temperature.flat(f"{name}temperature") | of.slope.flat(f"{name}slope")
        found[f"{name}temperature"] = of.temperature.value
        if of.bias is not None:
            record |= of.bias.flat("bias")
            found["bias"] = of.bias.value
    return Calibration(**found), record


def read_calibration(folder: Path) -> Calibration:
    """The calibration that a labeling run left in its folder; none was made where there is no file.

    Raises:
        UserError: naming the file if it is broken.
    """
    file = folder / FILE
    if not file.is_file():
        return Calibration()
    record: Mapping[str, Any] = read_json(file)
    try:
        return Calibration(*(float(record.get(name, default)) for name, default in vars(Calibration()).items()))
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{file}: not a calibration; it has no numeric temperature") from None
