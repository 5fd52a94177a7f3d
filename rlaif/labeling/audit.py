"""Measuring a labeler on pairs that people have labelled, before anyone trains on its labels."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif.config import PriceConfig
from rlaif.evaluation.statistics import (
    Estimate,
    clustered_difference,
    clustered_share,
    expected_calibration_error,
    fit_temperature,
    pairs_agreement,
)
from rlaif.labeling.aggregate import PairLabel, sigmoid
from rlaif.labeling.quality import verdict_quality
from rlaif.preferences import UnusableTranscriptError, parse_preference
from rlaif.records import Candidates, Completion, Label, Prompt, UserError, content_hash, parse_messages, read_jsonl

log = logging.getLogger("rlaif")

FIRST, SECOND = "a", "b"
"""Candidate ids of a comparison's two completions."""
BINS = 10
CLOSE = 0.1
"""Completions whose lengths differ by less than this share of the longer one count as equally long."""


@dataclass(frozen=True)
class Comparison:
    """Two completions of one prompt and what people said: ``truth`` is 1 for a, -1 for b, 0 for a tie."""

    name: str
    prompt: Prompt
    a: str
    b: str
    truth: int
    votes: tuple[int, ...] = ()
    """One entry per annotator, where they are known."""
    subset: str | None = None

    def candidates(self) -> Candidates:
        """The comparison as a line of candidates; its id is that of the comparison, which is unique."""
        prompt = Prompt(self.name, self.prompt.messages)
        return Candidates(prompt, (Completion(FIRST, self.a), Completion(SECOND, self.b)), "test")


def read_comparisons(path: Path, limit: int | None = None) -> list[Comparison]:
    """Labelled pairs: ``prompt`` with ``chosen`` and ``rejected``, or with ``response_a``, ``response_b``, ``label``.

    The second form takes ties and, as ``annotators``, a list of ``{"annotator", "label"}``. ``subset`` and ``id``
    are optional. ``chosen`` and ``rejected`` may be HH transcripts, and ``p_chosen`` says what people preferred: 0.5 is
    a tie, less turns the pair. Pairs of equal completions are left out: nobody can prefer one of them. So are
    transcripts that hold no pair and rows without an id that repeat an earlier one, with a warning that counts them.

    Args:
        path: JSONL, gzip if it ends in ``.gz``.
        limit: read only this many pairs, spread evenly over the file.

    Raises:
        UserError: naming file and line.
    """
    seen: set[str] = set()

    skipped: Counter[str] = Counter()

    def parse(line: dict[str, Any]) -> Comparison | None:
        try:
            comparison = _comparison(line)
        except UnusableTranscriptError as problem:
            skipped[f"transcripts {problem}"] += 1
            return None
        if comparison.name in seen:
            if line.get("id") not in (None, ""):
                raise ValueError(f'"id" {comparison.name!r} was used on an earlier line; ids must be unique')
            skipped["that repeat an earlier one"] += 1
            return None
        seen.add(comparison.name)
        return comparison

    read = list(read_jsonl(path, parse))
    if skipped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
        log.warning("%s: %d of %d pairs are left out: %s", path, skipped.total(), len(read), reasons)
    found = [comparison for comparison in read if comparison is not None and comparison.a != comparison.b]
    if not found:
        raise UserError(f"{path}: has no pairs of different completions")
    if limit is not None and limit < len(found):
        found = [found[place * len(found) // limit] for place in range(limit)]
    return found


def _comparison(line: Mapping[str, Any]) -> Comparison:
    votes: tuple[int, ...] = ()
    if "chosen" in line or "rejected" in line:
        pair = parse_preference(line)
        messages = pair.prompt
        # Which one stands as a must not tell which one is better.
        swapped = int(content_hash(messages, *sorted((pair.chosen, pair.rejected)))[:8], 16) % 2 == 1
        a, b, truth = pair.chosen, pair.rejected, (pair.p_chosen > 0.5) - (pair.p_chosen < 0.5)
        if swapped:
            a, b, truth = b, a, -truth
    else:
        for column in ("prompt", "response_a", "response_b", "label"):
            if line.get(column) is None:
                raise ValueError(
                    f'has no "{column}"; a labelled pair has "chosen" and "rejected", or "response_a", "response_b" '
                    'and "label"'
                )
        messages = parse_messages(line["prompt"])
        a, b, truth = line["response_a"], line["response_b"], _side(line["label"], "label")
        if not isinstance(a, str) or not isinstance(b, str) or not a.strip() or not b.strip():
            raise ValueError('"response_a" and "response_b" must be non-empty texts')
        annotators = line.get("annotators") or []
        if not isinstance(annotators, list) or not all(isinstance(vote, dict) for vote in annotators):
            raise ValueError('"annotators" must be a list of objects with "label"')
        votes = tuple(_side(vote.get("label"), "annotators[].label") for vote in annotators)
    name = line.get("id")
    subset = line.get("subset")
    return Comparison(
        content_hash(messages, a, b) if name in (None, "") else str(name),
        Prompt(content_hash(messages), messages),
        a,
        b,
        truth,
        votes,
        None if subset is None else str(subset),
    )


def _side(label: Any, what: str) -> int:
    sides = {"a": 1, "b": -1, "tie": 0}
    if not isinstance(label, str) or label not in sides:
        raise ValueError(f'"{what}" must be "a", "b" or "tie", found {label!r}')
    return sides[label]


def audit(
    comparisons: Sequence[Comparison],
    labels: Sequence[Label],
    pairs: Sequence[PairLabel],
    price: PriceConfig | None = None,
) -> dict[str, Any]:
    """Everything that the pairs say about the labeler, flat, every estimate with n and its 95 % interval.

    Pairs without a label count in ``missing``, not in the agreement; human ties are left out of it, and a tie of
    the labeler counts half. Every interval takes prompts as independent, and pairs of one prompt as not.

    Args:
        comparisons: what people said.
        labels: the labeler's verdicts.
        pairs: its labels, combined from the verdicts.
        price: of tokens, for what they cost.
    """
    by_name = {pair.prompt_id: pair for pair in pairs}
    rows = [(comparison, by_name[comparison.name]) for comparison in comparisons if comparison.name in by_name]
    sided = [(comparison, _towards_a(pair)) for comparison, pair in rows]
    decided = [(comparison, logit) for comparison, logit in sided if comparison.truth]
    result: dict[str, Any] = {
        "n_comparisons": len(comparisons),
        "n_labelled": len(rows),
        "missing": len(comparisons) - len(rows),
        "n_partial": sum(pair.missing_weight > 0 for _, pair in rows),
        "human_ties": sum(comparison.truth == 0 for comparison in comparisons),
        "labeler_ties": sum(logit == 0 for _, logit in sided),
    }
    result |= verdict_quality(labels)
    result |= _cost(labels, len(rows), price or PriceConfig())
    result |= _flat("agreement", _agreement(decided))
    result["kappa"] = cohens_kappa([(logit, comparison.truth) for comparison, logit in decided])
    result |= _flat("longer_wins", _agreement([(comparison, _longer(comparison)) for comparison, _ in decided]))
    # The same pairs for both: is the labeler better than a rule that reads nothing?
    gains = [
        right - baseline
        for right, baseline in zip(
            _right(decided), _right([(comparison, _longer(comparison)) for comparison, _ in decided]), strict=True
        )
    ]
    result |= _flat("gain_over_longer", clustered_difference(gains, _prompts(decided)))
    result |= _flat("human_ceiling", human_ceiling(comparisons))
    result |= _by_length(decided)
    for subset in sorted({comparison.subset for comparison, _ in decided if comparison.subset}):
        part = [(comparison, logit) for comparison, logit in decided if comparison.subset == subset]
        result |= _flat(f"agreement_subset_{subset}", _agreement(part))
    result |= _by_principle(rows)
    outcomes = [(sigmoid(logit), float(comparison.truth > 0)) for comparison, logit in decided]
    result["ece"] = expected_calibration_error([p for p, _ in outcomes], [won for _, won in outcomes], BINS)
    if decided:
        result["temperature"] = fit_temperature([logit for _, logit in decided], [won for _, won in outcomes])
    result["reliability"] = reliability(outcomes)
    return result


def _cost(labels: Sequence[Label], usable: int, price: PriceConfig) -> dict[str, float]:
    """Tokens of all verdicts and, where they have a price, money; also for each of so many usable labels."""
    read = sum(label.prompt_tokens or 0 for label in labels)
    written = sum(label.completion_tokens or 0 for label in labels)
    result: dict[str, float] = {"completion_tokens": written}
    if read + written and usable:
        result["tokens_per_usable_label"] = round((read + written) / usable, 1)
    if (price.input_per_million, price.output_per_million) != (None, None):
        usd = (read * (price.input_per_million or 0) + written * (price.output_per_million or 0)) / 1e6
        result["usd"] = round(usd, 6)
        if usable:
            result["usd_per_usable_label"] = round(usd / usable, 9)
    return result


def _towards_a(pair: PairLabel) -> float:
    return pair.logit if pair.one == FIRST else -pair.logit


def _longer(comparison: Comparison) -> float:
    return float(len(comparison.a) - len(comparison.b))


def _prompts(rows: Sequence[tuple[Comparison, float]]) -> list[str]:
    return [comparison.prompt.prompt_id for comparison, _ in rows]


def _right(rows: Sequence[tuple[Comparison, float]]) -> list[float]:
    return pairs_agreement([logit for _, logit in rows], [comparison.truth for comparison, _ in rows])


def _agreement(rows: Sequence[tuple[Comparison, float]]) -> Estimate | None:
    return clustered_share(_right(rows), _prompts(rows))


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | int | None]:
    return estimate.flat(name) if estimate else {}


def cohens_kappa(sides: Sequence[tuple[float, float]]) -> float | None:
    """Agreement beyond chance on which side is better (Cohen 1960): (observed - expected) / (1 - expected).

    ``sides`` are (labeler, human), by sign; a labeler tie is a category of its own. ``None`` where there is nothing to
    compare or chance alone agrees always.
    """
    if not sides:
        return None
    pairs = [((one > 0) - (one < 0), (other > 0) - (other < 0)) for one, other in sides]
    n = len(pairs)
    observed = sum(one == other for one, other in pairs) / n
    left, right = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    expected = sum(left[side] * right[side] for side in (-1, 0, 1)) / n**2
    return None if expected == 1 else round((observed - expected) / (1 - expected), 6)


def human_ceiling(comparisons: Sequence[Comparison]) -> Estimate | None:
    """How often two annotators who both took a side took the same one; over all pairs of annotators of a comparison."""
    same, clusters = [], []
    for comparison in comparisons:
        for one, other in itertools.combinations([vote for vote in comparison.votes if vote], 2):
            same.append(float(one == other))
            clusters.append(comparison.prompt.prompt_id)
    return clustered_share(same, clusters)


def _by_length(rows: Sequence[tuple[Comparison, float]]) -> dict[str, float | int | None]:
    """Agreement where people preferred the longer completion, the shorter one, and where lengths hardly differ."""
    groups: dict[str, list[tuple[Comparison, float]]] = defaultdict(list)
    for comparison, logit in rows:
        difference = _longer(comparison)
        if abs(difference) < CLOSE * max(len(comparison.a), len(comparison.b)):
            groups["similar_length"].append((comparison, logit))
        else:
            groups["longer_preferred" if difference * comparison.truth > 0 else "shorter_preferred"].append(
                (comparison, logit)
            )
    result: dict[str, float | int | None] = {}
    for name, group in groups.items():
        result |= _flat(f"agreement_{name}", _agreement(group))
    return result


def _by_principle(rows: Sequence[tuple[Comparison, PairLabel]]) -> dict[str, float | int | None]:
    names = sorted({name for _, pair in rows for name in pair.principles})
    result: dict[str, float | int | None] = {}
    if len(names) < 2:
        return result
    for name in names:
        part = [
            (comparison, pair.principles[name] * (1 if pair.one == FIRST else -1))
            for comparison, pair in rows
            if comparison.truth and name in pair.principles
        ]
        result |= _flat(f"agreement_principle_{name}", _agreement(part))
    return result


def reliability(outcomes: Sequence[tuple[float, float]], bins: int = BINS) -> list[dict[str, float | int]]:
    """Mean label, observed frequency and count of each non-empty bin: the reliability diagram's points."""
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for p, won in outcomes:
        groups[min(int(p * bins), bins - 1)].append((p, won))
    return [
        {
            "p": round(sum(p for p, _ in group) / len(group), 6),
            "observed": round(sum(won for _, won in group) / len(group), 6),
            "n": len(group),
        }
        for _, group in sorted(groups.items())
    ]


def verdict(result: Mapping[str, Any]) -> str:
    """What the audit means for somebody about to train on such labels, and how many pairs it says nothing of."""
    if not result["missing"]:
        return _verdict(result)
    return f"{_verdict(result)} {result['missing']} of {result['n_comparisons']} pairs had no label."


def trainable(result: Mapping[str, Any]) -> bool:
    """Whether agreement with people is shown to be above that of a coin."""
    return "agreement" in result and result["agreement_low"] > 0.5


def _verdict(result: Mapping[str, Any]) -> str:
    """Trainable, not trainable, or cannot tell; and why."""
    if "agreement" not in result:
        return "CANNOT TELL. DO NOT TRAIN ON THESE LABELS: no label on any pair on which people took a side."
    value, low, high = result["agreement"], result["agreement_low"], result["agreement_high"]
    figures = f"{value:.1%} [{low:.1%}, {high:.1%}] of {result['agreement_n']} prompts' pairs"
    if high < 0.5:
        return (
            "NOT TRAINABLE. DO NOT TRAIN ON THESE LABELS: the labeler agrees with people less often than a coin, on "
            f"{figures}."
        )
    if low <= 0.5:
        return (
            "CANNOT TELL. DO NOT TRAIN ON THESE LABELS: agreement with people cannot be told from that of a coin, on "
            f"{figures}. More pairs would narrow the interval."
        )
    longer = result["gain_over_longer_low"]
    if longer is None or longer <= 0:
        return (
            f"TRAINABLE: above chance, on {figures}; but not shown to be better than preferring the longer completion "
            f"({result['longer_wins']:.1%})."
        )
    return f"TRAINABLE: above chance, on {figures}, and better than preferring the longer completion."
