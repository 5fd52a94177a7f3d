"""What labels of an oracle must say, mode by mode, and whether a labeling run says it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_server import BROKEN, UNCLEAR, UNCOVERED, UNLISTED, WEIGHTS, Oracle, ballots, grades, shares, worth

REPO = Path(__file__).parents[2]
EPSILON = 1e-6
"""Probabilities are clipped to [1e-6, 1 - 1e-6]."""
CERTAIN = math.log((1 - EPSILON) / EPSILON)

Said = tuple[list[float] | None, str | None]
"""The share of each option, or the reason why there is none."""
Found = dict[tuple[str, ...], tuple[Any, str | None]]
"""What each label of a prompt must say (a number or a list), or the reason; by principle and what was shown."""


def command(name: str, *overrides: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", f"rlaif.{name}", *map(str, overrides)],
        cwd=REPO, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == code, result.stderr[-3000:]
    return result


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def preferences(folder: Path) -> dict[tuple[str, str, str], float]:
    """P(chosen is better) by prompt, chosen and rejected."""
    from rlaif.preferences import read_preferences

    rows = read_preferences(folder / "preferences", "train")
    found = {(row.prompt_id, row.chosen_id, row.rejected_id): row.p_chosen for row in rows}
    assert len(found) == len(rows)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def clipped_logit(p: float) -> float:
    return max(-CERTAIN, min(CERTAIN, math.log(p / (1 - p)) if 0 < p < 1 else math.inf * (p - 0.5)))


def said(logits: Sequence[float], texts: Sequence[str], oracle: Oracle, votes: int, raw: bool = False) -> Said:
    """What the oracle says about texts whose options have these logits.

    Shares of replies count one more reply, which is shared evenly between the options, but where they are ``raw``.
    """
    shown = " ".join(texts)
    if BROKEN in shown:
        return None, f"http_{oracle.broken}"
    p = shares([oracle.sign * logit for logit in logits], oracle.bias)
    if oracle.gives == "logprobs":
        reason = "option_unknown" if UNLISTED in shown else "uncovered" if UNCOVERED in shown else None
        return (None if reason else p), reason
    counts = ballots(p, votes)
    if UNCLEAR in shown or not any(counts):
        return None, "uncovered"
    more = 0 if raw else 1
    return [(count + more / len(p)) / (votes + more) for count in counts], None


def first(found: Said) -> tuple[float | None, str | None]:
    return None if found[0] is None else found[0][0], found[1]


class Mode:
    """What a mode's labels say, the pairs that they make, and the bias that they show."""

    def valid(self, found: Found) -> list[Any]:
        """The verdicts that the bias is measured on."""
        return [value for value, _ in found.values() if value is not None]


class Pairwise(Mode):
    """Both orders of each pair, under each principle."""

    overrides: tuple[str, ...] = ("labeling.mode=pairwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> Found:
        texts = {f"c{place}": text for place, text in enumerate(line["completions"])}
        return {
            (name, one, other): self.verdict(name, texts[one], texts[other], oracle, votes)
            for name in WEIGHTS
            for one, other in itertools.permutations(texts, 2)
        }

    def verdict(self, name: str, one: str, other: str, oracle: Oracle, votes: int) -> tuple[float | None, str | None]:
        return first(said((worth(name, one) - worth(name, other), 0.0), (one, other), oracle, votes))

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["first"], label["second"]

    def pair(self, found: Found, name: str, one: str, other: str) -> float | None:
        there, back = found[name, one, other][0], found[name, other, one][0]
        return None if there is None or back is None else (clipped_logit(there) - clipped_logit(back)) / 2

    def valid(self, found: Found) -> list[Any]:
        """Those of pairs with both orders."""
        both = [key for key in found if None not in (found[key][0], found[key[0], key[2], key[1]][0])]
        return [found[key][0] for key in both]

    value = "p_first"
    bias, tilt = "position_bias", staticmethod(clipped_logit)


class Reasoned(Pairwise):
    """Pairwise, each verdict the mean of those after several rationales, every one of them clipped.

    ``told`` has the rationales that the server gave: for each comparison (principle, first and second text) the logit
    by which each moves the verdict, None for an empty one.
    """

    def __init__(
        self, rationales: int, clamp: float, told: Mapping[tuple[str, str, str], Sequence[float | None]]
    ) -> None:
        self.clamp, self.told = clamp, told
        self.overrides = (
            f"labeling.rationales={rationales}",
            f"labeling.clamp={clamp}",
            "labeling.rationale_tokens=32",
        )

    def verdict(self, name: str, one: str, other: str, oracle: Oracle, votes: int) -> tuple[float | None, str | None]:
        if BROKEN in one + other:
            return None, "http_500"
        moves = self.told[name, one, other]
        if None in moves:
            return None, "empty_rationale"
        found = []
        for move in moves:
            assert move is not None
            logits = (worth(name, one) - worth(name, other) + move, 0.0)
            p, reason = first(said(logits, (one, other), oracle, votes, raw=True))
            if p is not None:
                found.append(min(max(p, self.clamp), 1 - self.clamp))
        if not found:
            return None, reason
        replies = 0 if oracle.gives == "logprobs" else votes * len(found)
        mean = sum(found) / len(found)
        return (mean * replies + 0.5) / (replies + 1) if replies else mean, None


class Pointwise(Mode):
    """Each completion alone, under each principle."""

    overrides = ("labeling.mode=pointwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> Found:
        return {
            (name, f"c{place}"): first(said((worth(name, text), 0.0), (text,), oracle, votes))
            for name in WEIGHTS
            for place, text in enumerate(line["completions"])
        }

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["candidate"]

    def pair(self, found: Found, name: str, one: str, other: str) -> float | None:
        left, right = found[name, one][0], found[name, other][0]
        return None if left is None or right is None else clipped_logit(left) - clipped_logit(right)

    value = "score"
    bias, tilt = "verdict_bias", staticmethod(clipped_logit)


class Score(Mode):
    """Each completion alone, under each principle: how likely every number from 1 to 9 is."""

    overrides = ("labeling.mode=score",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> Found:
        return {
            (name, f"c{place}"): said(grades(worth(name, text)), (text,), oracle, votes)
            for name in WEIGHTS
            for place, text in enumerate(line["completions"])
        }

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["candidate"]

    def pair(self, found: Found, name: str, one: str, other: str) -> float | None:
        left, right = found[name, one][0], found[name, other][0]
        if left is None or right is None:
            return None
        joint = np.outer(left, right)
        higher, lower = np.tril(joint, -1).sum(), np.triu(joint, 1).sum()
        return 0.0 if left == right else clipped_logit((1 + higher - lower) / 2)

    value = "probs"
    bias = "score_mean"

    def tilt(self, shares: list[float]) -> float:
        return sum(number * share for number, share in enumerate(shares, 1))


class Listwise(Mode):
    """Every rotation of the list, under each principle: how likely each one is the best."""

    overrides = ("labeling.mode=listwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> Found:
        texts = line["completions"]
        result: Found = {}
        for start, name in itertools.product(range(len(texts)), WEIGHTS):
            order = [(start + step) % len(texts) for step in range(len(texts))]
            logits = [worth(name, texts[place]) for place in order]
            result[name, *(f"c{place}" for place in order)] = said(logits, texts, oracle, votes)
        return result

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], *label["order"]

    def pair(self, found: Found, name: str, one: str, other: str) -> float | None:
        logits = []
        for (principle, *order), (best, _) in found.items():
            if principle == name:
                if best is None:
                    return None
                left, right = (max(best[order.index(shown)], EPSILON) for shown in (one, other))
                logits.append(math.log(left / right))
        return sum(logits) / len(logits)

    value = "probs"
    bias = "position_bias"

    def tilt(self, shares: list[float]) -> float:
        first, *others = (math.log(max(share, EPSILON)) for share in shares)
        return first - sum(others) / len(others)


class Contrastive(Mode):
    """How much likelier each completion is under one system prompt than under its opposite."""

    overrides = ("labeling.mode=contrastive",)

    def __init__(self, length: Callable[[str], int] | None = None) -> None:
        self.length = length
        if length is not None:
            self.overrides = (*self.overrides, "labeling.length_normalize=true")

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> Found:
        return {
            (name, f"c{place}"): self._score(name, text, oracle)
            for name in WEIGHTS
            for place, text in enumerate(line["completions"])
        }

    def _score(self, name: str, text: str, oracle: Oracle) -> tuple[float | None, str | None]:
        if BROKEN in text:
            return None, "engine_error"
        if UNCOVERED in text:
            return None, "not_finite"
        return (worth(name, text) + oracle.bias) / (self.length(text) if self.length else 1), None

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["candidate"]

    def pair(self, found: Found, name: str, one: str, other: str) -> float | None:
        left, right = found[name, one][0], found[name, other][0]
        return None if left is None or right is None else left - right

    value = "score"
    bias, tilt = "score_mean", staticmethod(float)


def principles(mode: Any, found: Found, one: str, other: str) -> dict[str, float]:
    """The logits of a pair under the principles that have their verdicts on it."""
    logits = {name: mode.pair(found, name, one, other) for name in WEIGHTS}
    return {name: value for name, value in logits.items() if value is not None}


def logits(mode: Any, found: Found, one: str, other: str) -> float | None:
    """The logit of a pair: the mean over its principles by weight; None if they have less than half of the weight."""
    by_principle = principles(mode, found, one, other)
    weight = sum(WEIGHTS[name] for name in by_principle)
    if weight < sum(WEIGHTS.values()) / 2:
        return None
    return float(sum(WEIGHTS[name] * value for name, value in by_principle.items()) / weight)


def check(folder: Path, mode: Any, expected: Mapping[str, Found]) -> None:
    """The verdicts in a folder are the expected ones, and so are its preferences: no other pair has one."""
    left = {name: dict(found) for name, found in expected.items()}
    labels = json_lines(folder / "labels.jsonl")
    assert len(labels) == sum(map(len, left.values()))
    for label in labels:
        value, reason = left[label["prompt_id"]].pop(mode.key(label))
        assert label.get("reason") == reason, label
        assert label.get(mode.value) == (None if value is None else pytest.approx(value, abs=1e-9)), label
    assert not any(left.values())

    pairs = {}
    names = sorted({name for found in expected.values() for key in found for name in key if name.startswith("c")})
    for prompt, found in expected.items():
        for one, other in itertools.combinations(names, 2):
            pairs[prompt, one, other] = logits(mode, found, one, other)
    dropped = check_preferences(folder, pairs)
    lost = dropped["no_verdict"]
    dropped["no_verdict"] = sum(not principles(mode, expected[prompt], *names) for prompt, *names in pairs)
    dropped["missing_weight"] = lost - dropped["no_verdict"]
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    assert quality["dropped"] == {reason: count for reason, count in dropped.items() if count}
    assert quality["n_pairs"] == len(pairs) - lost
    partial = [
        principles(mode, expected[prompt], *names) for (prompt, *names), logit in pairs.items() if logit is not None
    ]
    assert quality["n_partial"] == sum(len(found) < len(WEIGHTS) for found in partial)
    valid = [value for found in expected.values() for value in mode.valid(found)]
    assert quality[mode.bias] == pytest.approx(sum(map(mode.tilt, valid)) / len(valid), abs=1e-5)


def check_preferences(folder: Path, pairs: Mapping[tuple[str, str, str], float | None]) -> dict[str, int]:
    """Every pair with a logit is a preference of that side; returns how many cannot be one, by reason."""
    wanted, dropped = {}, {"no_verdict": 0, "tie": 0}
    for (prompt, one, other), logit in pairs.items():
        if logit is None:
            dropped["no_verdict"] += 1
        elif abs(logit) < 1e-9:
            dropped["tie"] += 1
        else:
            wanted[prompt, *((one, other) if logit > 0 else (other, one))] = sigmoid(abs(logit))
    assert preferences(folder) == {key: pytest.approx(p, abs=1e-6) for key, p in wanted.items()}
    return dropped


# A further mode is a further class like these, a reader in oracle_server.py, and a line here.
MODES: dict[str, Any] = {"pairwise": Pairwise(), "pointwise": Pointwise(), "score": Score(), "listwise": Listwise()}
