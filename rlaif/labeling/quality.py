"""How good are the labels? Bias, coverage and, where a gold judge exists, agreement.

Both measures take one prompt at a time and hold no label: 16 bytes a prompt for each mean with an interval, and
16 bytes a pair for the calibration error against a gold judge.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif.evaluation.statistics import ClusteredMean, expected_calibration_error
from rlaif.gold import gold_score
from rlaif.labeling.aggregate import EPSILON, PairLabel, logit
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

    ``same_position_rate``: share of pairs whose two orders name the same position; for a list, share of the pairs of
    its orders. ``position_bias``: mean logit for the first position (0 is unbiased), over pairs with
    both orders: a single one may be all there is because of what it says. For a list, its logarithm less the
    mean of the others'. ``verdict_bias``: mean logit of yes (pointwise). ``score_mean``: mean ``score``. ``truncated``:
    verdicts on a text that was too long to be shown whole.
    """

    def __init__(self) -> None:
        self._prompts = self._verdicts = self._masses = self._tokens = self._truncated = 0
        self._mass = 0.0
        self._reasons: Counter[str] = Counter()
        self._methods: Counter[str] = Counter()
        self._means: dict[str, ClusteredMean] = defaultdict(ClusteredMean)
        self._same_position = ClusteredMean()

    def add(self, labels: Sequence[Label]) -> None:
        """The labels of one prompt."""
        prompt, self._prompts = self._prompts, self._prompts + 1
        orders: dict[tuple[Any, ...], list[tuple[int | None, float]]] = defaultdict(list)
        for label in labels:
            self._verdicts += 1
            self._tokens += label.prompt_tokens or 0
            self._truncated += bool(label.truncated)
            if label.option_mass is not None:
                self._masses += 1
                self._mass += label.option_mass
            if label.verdict is None:
                self._reasons[str(label.reason)] += 1
                continue
            self._methods[label.method] += 1
            name, value = _bias(label)
            if name == "position_bias":
                shown = label.order or (label.first, label.second)
                orders[label.principle, *sorted(map(str, shown))].append((_favourite(label), value))
            else:
                self._means[name].add(value, prompt)
        for verdicts in orders.values():
            if len(verdicts) > 1:
                for _, value in verdicts:
                    self._means["position_bias"].add(value, prompt)
            named = [place for place, _ in verdicts if place is not None]
            same = [one == other for one, other in itertools.combinations(named, 2)]
            if same:
                self._same_position.add(sum(same) / len(same), prompt)

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
        for name, mean in self._means.items():
            estimate = mean.estimate()
            if estimate is not None:
                result |= estimate.flat(name)
        same = self._same_position.share()
        return result if same is None else result | same.flat("same_position_rate")


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile of the seconds that a verdict took."""
    if not seconds:
        return {}
    median, p95 = np.percentile(seconds, [50, 95])
    return {"latency_median_s": round(float(median), 4), "latency_p95_s": round(float(p95), 4)}


def _bias(label: Label) -> tuple[str, float]:
    """What a usable verdict adds to, and the value."""
    if label.order is not None and label.probs is not None:
        # Each candidate stands first in one of the orders, so that the mean over them leaves the position alone.
        first, *others = (math.log(max(p, EPSILON)) for p in label.probs)
        return "position_bias", first - sum(others) / len(others)
    if label.p is not None:
        return "position_bias" if label.candidate is None else "verdict_bias", logit(label.p)
    assert label.score is not None
    return "score_mean", label.score


def _favourite(label: Label) -> int | None:
    """The position that a verdict names; a tie names none."""
    shares = label.probs
    if shares is None:
        assert label.p is not None
        shares = (label.p, 1 - label.p)
    best = [place for place, share in enumerate(shares) if share == max(shares)]
    return best[0] if len(best) == 1 else None


class MissingWeight:
    """How many pair labels are without some of their principles, and with what share of the weight."""

    def __init__(self) -> None:
        self._pairs = self._partial = 0
        self._missing = 0.0

    def add(self, pairs: Sequence[PairLabel]) -> None:
        """One prompt's labels; those that were inferred have no verdicts that could be missing."""
        for pair in pairs:
            if not pair.inferred:
                self._pairs += 1
                self._partial += pair.missing_weight > 0
                self._missing += pair.missing_weight

    def result(self) -> dict[str, Any]:
        """Flat figures."""
        mean = round(self._missing / self._pairs, 6) if self._pairs else None
        return {"n_partial": self._partial, "missing_weight_mean": mean}


class GoldAgreement:
    """Agreement of pair labels with the gold judge, and of the rule "the longer completion wins"."""

    def __init__(self, gold: str) -> None:
        self._gold = gold
        self._prompts = self._pairs = 0
        self._shares = {name: ClusteredMean() for name in ("agreement", "agreement_clear", "longer_wins")}
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
        self._shares[name].add(0.5 if sign == 0 else float((sign > 0) == (truth > 0)), prompt)

    def result(self) -> Mapping[str, Any]:
        """Flat figures, every estimate with its n and interval."""
        result: dict[str, Any] = {"n_pairs": self._pairs, "gold": self._gold}
        for name, share in self._shares.items():
            estimate = share.share()
            if estimate is not None:
                result |= estimate.flat(name)
        result["ece"] = expected_calibration_error(self._p, self._won)
        return result
