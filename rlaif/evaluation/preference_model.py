"""How good is a preference model on held-out pairs?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlaif.evaluation.statistics import (
    clustered_difference,
    clustered_mean,
    clustered_share,
    expected_calibration_error,
    fit_temperature,
    pairs_agreement,
)
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import logit, sigmoid
from rlaif.losses import soft_bradley_terry
from rlaif.preference_model import Scorer
from rlaif.records import Preference

# Completions whose lengths differ by less than this share of the longer one count as equally long.
_SIMILAR_LENGTH = 0.1


def pair_scores(model: Scorer, preferences: Sequence[Preference]) -> tuple[list[float], list[float]]:
    """Scores of the chosen and of the rejected completions."""
    scores = model.score([preference.examples[side] for side in (0, 1) for preference in preferences])
    return scores[: len(preferences)], scores[len(preferences) :]


def calibration(model: Scorer, preferences: Sequence[Preference]) -> dict[str, Any]:
    """What a user of the scores needs: their mean and deviation on reference completions, and the temperature.

    Completions that stand in several pairs count once.
    """
    chosen, rejected = pair_scores(model, preferences)
    distinct: dict[tuple[str, str], float] = {}
    for preference, left, right in zip(preferences, chosen, rejected, strict=True):
        distinct[preference.prompt_id, preference.chosen] = left
        distinct[preference.prompt_id, preference.rejected] = right
    scores = list(distinct.values())
    margins = [left - right for left, right in zip(chosen, rejected, strict=True)]
    return {
        "temperature": fit_temperature(margins, [preference.p_chosen for preference in preferences]),
        "score_mean": float(np.mean(scores)),
        "score_std": float(np.std(scores)),
        "n_completions": len(scores),
    }


def preference_metrics(model: Scorer, preferences: Sequence[Preference], gold: str | None = None) -> dict[str, Any]:
    """Accuracy, soft negative log-likelihood, calibration, fitted temperature and the longer-wins baseline.

    Accuracy counts agreement with the labels' side; ``gold_accuracy`` with the gold judge. Intervals take prompts
    as independent.
    """
    chosen, rejected = pair_scores(model, preferences)
    scores = [*chosen, *rejected]
    margins = [left - right for left, right in zip(chosen, rejected, strict=True)]
    labels = [preference.p_chosen for preference in preferences]
    prompts = [preference.prompt_id for preference in preferences]
    side = [label - 0.5 for label in labels]
    result: dict[str, Any] = {"validation_pairs": len(preferences)}
    nll = soft_bradley_terry(torch.tensor(margins), torch.tensor(labels)).tolist()
    longer = [float(len(preference.chosen) - len(preference.rejected)) for preference in preferences]
    rows: list[tuple[str, Sequence[float], Sequence[float]]] = [
        ("accuracy", margins, side),
        ("longer_wins", longer, side),
    ]
    if gold is not None:
        truth = [
            gold_score(gold, preference.chosen) - gold_score(gold, preference.rejected) for preference in preferences
        ]
        rows.append(("gold_accuracy", margins, truth))
    for name, predicted, actual in rows:
        clusters = [prompt for prompt, value in zip(prompts, actual, strict=True) if value != 0]
        estimate = clustered_share(pairs_agreement(predicted, actual), clusters)
        result |= estimate.flat(name) if estimate else {}
    decided = [prompt for prompt, value in zip(prompts, side, strict=True) if value != 0]
    right = zip(pairs_agreement(margins, side), pairs_agreement(longer, side), strict=True)
    estimate = clustered_difference([by_pm - by_length for by_pm, by_length in right], decided)
    result |= estimate.flat("gain_over_longer") if estimate else {}
    estimate = clustered_mean(nll, prompts, least=0.0)
    result |= estimate.flat("nll") if estimate else {}
    # Both directions of each pair: the error then does not depend on which side is called chosen.
    probabilities = [sigmoid(margin) for margin in margins]
    result["ece"] = expected_calibration_error(
        [*probabilities, *(1 - p for p in probabilities)], [*labels, *(1 - label for label in labels)]
    )
    result["temperature"] = fit_temperature(margins, labels)
    result["score_mean"], result["score_std"] = float(np.mean(scores)), float(np.std(scores))
    result["accuracy_by_source"] = _accuracies(preferences, margins, [_source(one) for one in preferences])
    result["accuracy_by_length"] = _accuracies(preferences, margins, [_longer(one) for one in preferences])
    return result | best_of_n_agreement(preferences, chosen, rejected, gold)


def _source(preference: Preference) -> str:
    return " / ".join(part for part in (preference.feedback, preference.labeler, preference.source) if part)


def _longer(preference: Preference) -> str:
    """Which side is longer, in characters; a PM that has learned length fails where the shorter one was chosen."""
    chosen, rejected = len(preference.chosen), len(preference.rejected)
    if abs(chosen - rejected) < _SIMILAR_LENGTH * max(chosen, rejected):
        return "similar"
    return "chosen longer" if chosen > rejected else "chosen shorter"


def _accuracies(
    preferences: Sequence[Preference], margins: Sequence[float], groups: Sequence[str]
) -> dict[str, dict[str, float | int | None]]:
    """Accuracy by group, with its interval."""
    result = {}
    for group in sorted(set(groups)):
        rows = [
            (margin, preference)
            for margin, preference, name in zip(margins, preferences, groups, strict=True)
            if name == group and preference.p_chosen != 0.5
        ]
        right = pairs_agreement([margin for margin, _ in rows], [row.p_chosen - 0.5 for _, row in rows])
        estimate = clustered_share(right, [row.prompt_id for _, row in rows])
        if estimate is not None:
            result[group] = estimate.flat("accuracy")
    return result


def best_of_n_agreement(
    preferences: Sequence[Preference], chosen: Sequence[float], rejected: Sequence[float], gold: str | None
) -> dict[str, Any]:
    """Share of prompts where the PM's best completion is also the best by the truth, and what chance would reach.

    The truth is the gold judge; without one, the summed logits of the labels. This is what best-of-n, and PPO at its
    best, get out of a PM, which its accuracy on pairs does not tell.
    """
    scores: dict[str, dict[str, float]] = {}
    truth: dict[str, dict[str, float]] = {}
    for preference, left, right in zip(preferences, chosen, rejected, strict=True):
        scored = scores.setdefault(preference.prompt_id, {})
        true = truth.setdefault(preference.prompt_id, {})
        for text, score, sign in ((preference.chosen, left, 1), (preference.rejected, right, -1)):
            scored[text] = score
            known = gold_score(gold, text) if gold else true.get(text, 0.0) + sign * logit(preference.p_chosen)
            true[text] = known
    hits = {name: _hit(scored, truth[name]) for name, scored in scores.items()}
    known_prompts = [name for name, hit in hits.items() if hit is not None]
    estimate = clustered_share([float(hits[name] or 0.0) for name in known_prompts], known_prompts)
    if estimate is None:
        return {}
    chance = [
        sum(value == max(truth[name].values()) for value in truth[name].values()) / len(truth[name])
        for name in known_prompts
    ]
    return {**estimate.flat("best_of_n_agreement"), "best_of_n_chance": float(np.mean(chance))}


def _hit(scored: Mapping[str, float], true: Mapping[str, float]) -> float | None:
    """1 if the best by score is among the best by truth; None where the truth sees no difference."""
    best = max(true.values())
    if min(true.values()) == best:
        return None
    return float(true[max(scored, key=lambda text: scored[text])] == best)
