"""How good is a preference model on held-out pairs?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlaif.evaluation.statistics import bootstrap_mean, expected_calibration_error, fit_temperature, pairs_agreement
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import sigmoid
from rlaif.losses import soft_bradley_terry
from rlaif.preference_model import PreferenceModel
from rlaif.records import Preference


def preference_metrics(
    model: PreferenceModel, preferences: Sequence[Preference], gold: str | None = None
) -> dict[str, Any]:
    """Accuracy, soft negative log-likelihood, calibration, fitted temperature and the longer-wins baseline.

    Accuracy counts agreement with the labels' side; ``gold_accuracy`` with the gold judge. Intervals resample
    prompts.
    """
    examples = [(preference.prompt, preference.chosen) for preference in preferences]
    examples += [(preference.prompt, preference.rejected) for preference in preferences]
    scores = model.score(examples)
    margins = [scores[i] - scores[i + len(preferences)] for i in range(len(preferences))]
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
        estimate = bootstrap_mean(pairs_agreement(predicted, actual), clusters)
        result |= estimate.flat(name) if estimate else {}
    estimate = bootstrap_mean(nll, prompts)
    result |= estimate.flat("nll") if estimate else {}
    # Both directions of each pair: the error then does not depend on which side is called chosen.
    probabilities = [sigmoid(margin) for margin in margins]
    result["ece"] = expected_calibration_error(
        [*probabilities, *(1 - p for p in probabilities)], [*labels, *(1 - label for label in labels)]
    )
    result["temperature"] = fit_temperature(margins, labels)
    result["score_mean"], result["score_std"] = float(np.mean(scores)), float(np.std(scores))
    return result
