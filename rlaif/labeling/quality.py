"""How good are the labels? Bias, coverage and, where a gold judge exists, agreement.

Both measures take one prompt at a time, so that a million labels need no more memory than a thousand.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif.evaluation.statistics import ClusteredMean, expected_calibration_error
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import PairLabel, logit
from rlaif.records import Candidates, Label

# Gold scores that differ by less are hard to tell apart for anybody.
CLEAR_MARGIN = 0.2


def verdict_quality(labels: Iterable[Label]) -> dict[str, Any]:
    """:class:`VerdictQuality` of labels that fit into memory."""
    by_prompt: dict[str, list[Label]] = defaultdict(list)
    for label in labels:
        by_prompt[label.prompt_id].append(label)
    quality = VerdictQuality()
    for group in by_prompt.values():
        quality.add(group)
    return quality.result()


class VerdictQuality:
    """Coverage and bias of raw verdicts; needs no truth.

    ``same_position_rate``: share of pairs whose two orders name the same position. ``position_bias``: mean logit
    for the first position (0 is unbiased). ``verdict_bias``: mean logit of yes (pointwise). ``truncated``: verdicts
    on a text that was too long to be shown whole.
    """

    def __init__(self) -> None:
        self._prompts = self._verdicts = self._masses = self._tokens = self._truncated = 0
        self._mass = 0.0
        self._mode: str | None = None
        self._reasons: Counter[str] = Counter()
        self._methods: Counter[str] = Counter()
        self._bias, self._same = ClusteredMean(), ClusteredMean()

    def add(self, labels: Sequence[Label]) -> None:
        """The labels of one prompt."""
        prompt, self._prompts = self._prompts, self._prompts + 1
        orders: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for label in labels:
            self._verdicts += 1
            self._tokens += label.prompt_tokens or 0
            self._truncated += bool(label.truncated)
            if label.option_mass is not None:
                self._masses += 1
                self._mass += label.option_mass
            if label.p is None:
                self._reasons[str(label.reason)] += 1
                continue
            self._methods[label.method] += 1
            self._mode = self._mode or label.mode
            value = logit(label.p)
            self._bias.add(value, prompt)
            if label.first is not None and label.second is not None:
                orders[label.principle, *sorted((label.first, label.second))].append(value)
        for values in orders.values():
            # A logit of exactly 0 names no position.
            if len(values) == 2 and all(values):
                self._same.add(float((values[0] > 0) == (values[1] > 0)), prompt)

    def reasons(self) -> dict[str, int]:
        """Verdicts that are missing, by reason."""
        return dict(self._reasons.most_common())

    def result(self) -> dict[str, Any]:
        """Flat figures, every estimate with its n and interval."""
        reasons = Counter(self._reasons)
        result: dict[str, Any] = {
            "n_verdicts": self._verdicts,
            "uncovered": reasons.pop("uncovered", 0),
            "unlisted": reasons.pop("option_unknown", 0),
            "failed": sum(reasons.values()),
            "failed_reasons": dict(reasons),
            "truncated": self._truncated,
            "methods": dict(self._methods),
            "option_mass_mean": round(self._mass / self._masses, 6) if self._masses else None,
            "prompt_tokens": self._tokens,
        }
        bias, same = self._bias.estimate(), self._same.estimate()
        if bias is not None:
            result |= bias.flat("verdict_bias" if self._mode == "pointwise" else "position_bias")
        if same is not None:
            result |= same.flat("same_position_rate")
        return result


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of the seconds that a verdict took."""
    if not seconds:
        return {}
    median, p95 = np.percentile(seconds, [50, 95])
    return {"latency_median_s": round(float(median), 4), "latency_p95_s": round(float(p95), 4)}


class GoldAgreement:
    """Agreement of pair labels with the gold judge, and of the rule "the longer completion wins"."""

    def __init__(self, gold: str) -> None:
        self._gold = gold
        self._prompts = self._pairs = 0
        self._means = {name: ClusteredMean() for name in ("agreement", "agreement_clear", "longer_wins")}
        self._p, self._won = array("d"), array("d")

    def add(self, line: Candidates, pairs: Sequence[PairLabel]) -> None:
        """One prompt's labels."""
        prompt, self._prompts = self._prompts, self._prompts + 1
        self._pairs += len(pairs)
        if not pairs:
            return
        texts = {candidate.candidate_id: candidate.completion for candidate in line.candidates}
        scores = {name: gold_score(self._gold, text) for name, text in texts.items()}
        for pair in pairs:
            truth = scores[pair.one] - scores[pair.other]
            if truth == 0:
                continue
            self._count("agreement", pair.logit, truth, prompt)
            if abs(truth) >= CLEAR_MARGIN:
                self._count("agreement_clear", pair.logit, truth, prompt)
            self._count("longer_wins", len(texts[pair.one]) - len(texts[pair.other]), truth, prompt)
            self._p.append(pair.p)
            self._won.append(float(truth > 0))

    def _count(self, name: str, sign: float, truth: float, prompt: int) -> None:
        self._means[name].add(0.5 if sign == 0 else float((sign > 0) == (truth > 0)), prompt)

    def result(self) -> Mapping[str, Any]:
        """Flat figures, every estimate with its n and interval."""
        result: dict[str, Any] = {"n_pairs": self._pairs, "gold": self._gold}
        for name, mean in self._means.items():
            estimate = mean.estimate()
            if estimate is not None:
                result |= estimate.flat(name)
        result["ece"] = expected_calibration_error(self._p, self._won)
        return result
