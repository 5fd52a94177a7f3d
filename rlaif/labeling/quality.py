"""How good are the labels? Bias, coverage and, where a gold judge exists, agreement."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.evaluation.statistics import bootstrap_mean, expected_calibration_error, pairs_agreement
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import PairLabel, logit
from rlaif.records import Candidates, Label

# Gold scores that differ by less are hard to tell apart for anybody.
CLEAR_MARGIN = 0.2


def verdict_quality(labels: Sequence[Label]) -> dict[str, Any]:
    """Coverage and bias of raw verdicts; needs no truth.

    ``same_position_rate``: share of pairs whose two orders name the same position. ``position_bias``: mean logit
    for the first position (0 is unbiased). ``verdict_bias``: mean logit of yes (pointwise).
    """
    reasons = Counter(label.reason for label in labels if label.p is None)
    masses = [label.option_mass for label in labels if label.option_mass is not None]
    valid = [label for label in labels if label.p is not None]
    result: dict[str, Any] = {
        "n_verdicts": len(labels),
        "uncovered": reasons.pop("uncovered", 0),
        "unlisted": reasons.pop("option_unknown", 0),
        "failed": sum(reasons.values()),
        "failed_reasons": dict(reasons),
        "methods": dict(Counter(label.method for label in valid)),
        "option_mass_mean": round(sum(masses) / len(masses), 6) if masses else None,
        "prompt_tokens": sum(label.prompt_tokens or 0 for label in labels),
    }
    if not valid:
        return result
    logits = [logit(label.p) for label in valid if label.p is not None]
    if valid[0].mode == "pointwise":
        estimate = bootstrap_mean(logits, [label.prompt_id for label in valid])
        return result | (estimate.flat("verdict_bias") if estimate else {})
    estimate = bootstrap_mean(logits, [label.prompt_id for label in valid])
    result |= estimate.flat("position_bias") if estimate else {}
    orders: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for label, value in zip(valid, logits, strict=True):
        pair = tuple(sorted((label.first or "", label.second or "")))
        orders[label.prompt_id, label.principle, pair].append(value)
    # A logit of exactly 0 names no position.
    both = {key: values for key, values in orders.items() if len(values) == 2 and all(values)}
    same = bootstrap_mean(
        [float((values[0] > 0) == (values[1] > 0)) for values in both.values()], [key[0] for key in both]
    )
    return result | (same.flat("same_position_rate") if same else {})


def gold_agreement(lines: Sequence[Candidates], pairs: Sequence[PairLabel], gold: str) -> dict[str, Any]:
    """Agreement of pair labels with the gold judge, and of the rule "the longer completion wins"."""
    texts = {
        (line.prompt.prompt_id, candidate.candidate_id): candidate.completion
        for line in lines
        for candidate in line.candidates
    }
    scores = {key: gold_score(gold, text) for key, text in texts.items()}
    truth = [scores[pair.prompt_id, pair.one] - scores[pair.prompt_id, pair.other] for pair in pairs]
    longer = [float(len(texts[pair.prompt_id, pair.one]) - len(texts[pair.prompt_id, pair.other])) for pair in pairs]
    prompts = [pair.prompt_id for pair in pairs]
    logits = [pair.logit for pair in pairs]
    result: dict[str, Any] = {"n_pairs": len(pairs), "gold": gold}
    result |= _agreement("agreement", logits, truth, prompts)
    clear = [true if abs(true) >= CLEAR_MARGIN else 0.0 for true in truth]
    result |= _agreement("agreement_clear", logits, clear, prompts)
    result |= _agreement("longer_wins", longer, truth, prompts)
    outcomes = [(pair.p, float(true > 0)) for pair, true in zip(pairs, truth, strict=True) if true != 0]
    result["ece"] = expected_calibration_error([p for p, _ in outcomes], [won for _, won in outcomes])
    return result


def _agreement(
    name: str, logits: Sequence[float], truth: Sequence[float], prompts: Sequence[str]
) -> Mapping[str, float | int]:
    clusters = [prompt for prompt, true in zip(prompts, truth, strict=True) if true != 0]
    estimate = bootstrap_mean(pairs_agreement(logits, truth), clusters)
    return estimate.flat(name) if estimate else {}
