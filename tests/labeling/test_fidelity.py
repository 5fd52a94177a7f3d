"""The labels are what the labeler said: a planted oracle comes out as it was put in, through the public commands."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_server import (
    BROKEN,
    CONSTITUTION,
    UNCLEAR,
    UNCOVERED,
    UNLISTED,
    WEIGHTS,
    Oracle,
    grades,
    serve,
    shares,
    worth,
)

from rlaif.labeling.aggregate import pair_labels
from rlaif.records import Label

REPO = Path(__file__).parents[2]
FLAGS = ("", UNCOVERED, UNLISTED, UNCLEAR, BROKEN)
CERTAIN = math.log((1 - 1e-6) / 1e-6)
"""The logit of a verdict without any doubt: probabilities are clipped to [1e-6, 1 - 1e-6]."""


def command(name: str, *overrides: Any) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", f"rlaif.{name}", *map(str, overrides)],
        cwd=REPO, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def planted(seed: int = 0) -> list[dict[str, Any]]:
    """Every flag on one, the other or no completion of a triple; values with exact ties under either principle."""
    draw = random.Random(seed)
    lines = []
    for number, flags in enumerate([*itertools.product(FLAGS, repeat=2), *[("", "")] * 10]):
        values = [(draw.choice([-1.5, 0.25, 2.0]), draw.choice([-1.0, 0.5])) for _ in range(3)]
        if number % 5 == 0:
            values[1] = values[0]
        texts = [
            f"Text {number}.{place} {{kind={kind:+.2f} short={short:+.2f}}} {flag}"
            for place, ((kind, short), flag) in enumerate(zip(values, (*flags, ""), strict=True))
        ]
        lines.append(
            {"prompt": f"Question {number}?", "prompt_id": f"p{number}", "split": "train", "completions": texts}
        )
    return lines


def preferences(folder: Path) -> dict[tuple[str, str, str], float]:
    """P(chosen is better) by prompt, chosen and rejected."""
    from rlaif.preferences import read_preferences

    rows = read_preferences(folder / "out" / "preferences", "train")
    found = {(row.prompt_id, row.chosen_id, row.rejected_id): row.p_chosen for row in rows}
    assert len(found) == len(rows)
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def verdict(logit: float, texts: tuple[str, ...], gives: str, votes: int) -> tuple[float | None, str | None]:
    """What the label must say: the oracle's probability, or why there is none."""
    shown = " ".join(texts)
    p = sigmoid(logit)
    if BROKEN in shown:
        return None, "http_500"
    if gives == "logprobs":
        reason = "option_unknown" if UNLISTED in shown else "uncovered" if UNCOVERED in shown else None
        return (None if reason else p), reason
    if UNCLEAR in shown or (votes == 1 and logit == 0):
        return None, "uncovered"
    return (round(p * votes) / votes if votes > 1 else float(p > 0.5)), None


def clipped_logit(p: float) -> float:
    return max(-CERTAIN, min(CERTAIN, math.log(p / (1 - p)) if 0 < p < 1 else math.inf * (p - 0.5)))


class Pairwise:
    """Both orders of each pair, under each principle."""

    overrides = ("labeling.mode=pairwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> dict[tuple[str, ...], Any]:
        texts = {f"c{place}": text for place, text in enumerate(line["completions"])}
        return {
            (name, one, other): verdict(
                worth(name, texts[one]) - worth(name, texts[other]) + oracle.bias,
                (texts[one], texts[other]),
                oracle.gives,
                votes,
            )
            for name in WEIGHTS
            for one, other in itertools.permutations(texts, 2)
        }

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["first"], label["second"]

    def pair(self, found: dict[tuple[str, ...], Any], name: str, one: str, other: str) -> float | None:
        there, back = found[name, one, other][0], found[name, other, one][0]
        return None if there is None or back is None else (clipped_logit(there) - clipped_logit(back)) / 2

    value = "p_first"
    bias, tilt = "position_bias", staticmethod(clipped_logit)


class Pointwise:
    """Each completion alone, under each principle."""

    overrides = ("labeling.mode=pointwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> dict[tuple[str, ...], Any]:
        return {
            (name, f"c{place}"): verdict(worth(name, text) + oracle.bias, (text,), oracle.gives, votes)
            for name in WEIGHTS
            for place, text in enumerate(line["completions"])
        }

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["candidate"]

    def pair(self, found: dict[tuple[str, ...], Any], name: str, one: str, other: str) -> float | None:
        left, right = found[name, one][0], found[name, other][0]
        return None if left is None or right is None else clipped_logit(left) - clipped_logit(right)

    value = "score"
    bias, tilt = "verdict_bias", staticmethod(clipped_logit)


class Score:
    """Each completion alone, under each principle: how likely every number from 1 to 10 is."""

    overrides = ("labeling.mode=score",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> dict[tuple[str, ...], Any]:
        return {
            (name, f"c{place}"): distribution(grades(worth(name, text)), (text,), oracle)
            for name in WEIGHTS
            for place, text in enumerate(line["completions"])
        }

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], label["candidate"]

    def pair(self, found: dict[tuple[str, ...], Any], name: str, one: str, other: str) -> float | None:
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


class Listwise:
    """Every rotation of the list, under each principle: how likely each one is the best."""

    overrides = ("labeling.mode=listwise",)

    def expected(self, line: dict[str, Any], oracle: Oracle, votes: int) -> dict[tuple[str, ...], Any]:
        texts = line["completions"]
        result = {}
        for start, name in itertools.product(range(3), WEIGHTS):
            order = [(start + step) % 3 for step in range(3)]
            logits = tuple(worth(name, texts[place]) for place in order)
            key = (name, *(f"c{place}" for place in order))
            result[key] = distribution(logits, tuple(texts), oracle)
        return result

    def key(self, label: dict[str, Any]) -> tuple[str, ...]:
        return label["principle"], *label["order"]

    def pair(self, found: dict[tuple[str, ...], Any], name: str, one: str, other: str) -> float | None:
        logits = []
        for (principle, *order), (best, _) in found.items():
            if principle == name:
                if best is None:
                    return None
                logits.append(math.log(best[order.index(one)] / best[order.index(other)]))
        return sum(logits) / 3

    value = "probs"
    bias = "position_bias"

    def tilt(self, shares: list[float]) -> float:
        first, *others = map(math.log, shares)
        return first - sum(others) / len(others)


def distribution(
    logits: tuple[float, ...], texts: tuple[str, ...], oracle: Oracle
) -> tuple[list[float] | None, str | None]:
    """What a label over several options must say, or why there is none."""
    _, reason = verdict(0.0, texts, "logprobs", 1)
    return (None if reason else shares(logits, oracle.bias)), reason


# A further mode adds a class like these, a reader in oracle_server.py, and a line here.
MODES: dict[str, Any] = {"pairwise": Pairwise(), "pointwise": Pointwise()}
SEVERAL: dict[str, Any] = {"score": Score(), "listwise": Listwise()}
SERVERS = {
    "logprobs": (Oracle(), 1),
    "biased logprobs": (Oracle(bias=4.0), 1),
    "contrary logprobs": (Oracle(bias=-2.5), 1),
    "text": (Oracle(gives="text"), 1),
    "votes": (Oracle(gives="text"), 8),
}


CASES = [*itertools.product(MODES, SERVERS), *itertools.product(SEVERAL, list(SERVERS)[:3])]


@pytest.mark.slow
@pytest.mark.parametrize(("mode_name", "server_name"), CASES)
def test_a_server_with_a_known_answer_comes_out_as_it_went_in(mode_name: str, server_name: str, tmp_path: Path) -> None:
    mode, (oracle, votes) = (MODES | SEVERAL)[mode_name], SERVERS[server_name]
    lines = planted()
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    server = serve(oracle)
    try:
        command(
            "label",
            f"candidates={tmp_path}/candidates.jsonl",
            f"constitution={tmp_path}/planted.yaml",
            f"output_dir={tmp_path}/out",
            "labeler=openai",
            "labeler.model=judge",
            f"labeler.base_url={server.url}",
            "labeler.max_retries=0",
            f"labeler.votes={votes}",
            *mode.overrides,
        )
    finally:
        server.close()

    # Every verdict is the oracle's, or says why there is none.
    expected = {line["prompt_id"]: mode.expected(line, oracle, votes) for line in lines}
    labels = json_lines(tmp_path / "out" / "labels.jsonl")
    assert len(labels) == sum(map(len, expected.values()))
    for label in labels:
        p, reason = expected[label["prompt_id"]].pop(mode.key(label))
        assert label.get("reason") == reason, label
        assert label.get(mode.value) == (None if p is None else pytest.approx(p, abs=1e-9)), label
    assert not any(expected.values())

    # Every pair with all its verdicts is a preference of the oracle's; no other is.
    wanted = {}
    dropped = {"no_verdict": 0, "tie": 0}
    for line in lines:
        found = mode.expected(line, oracle, votes)
        for one, other in itertools.combinations(("c0", "c1", "c2"), 2):
            by_principle = {name: mode.pair(found, name, one, other) for name in WEIGHTS}
            if None in by_principle.values():
                dropped["no_verdict"] += 1
                continue
            logit = sum(WEIGHTS[name] * value for name, value in by_principle.items()) / sum(WEIGHTS.values())
            if abs(logit) < 1e-9:
                dropped["tie"] += 1
            else:
                wanted[line["prompt_id"], *((one, other) if logit > 0 else (other, one))] = sigmoid(abs(logit))
    kept = preferences(tmp_path)
    # The odds of a list are summed over its rotations: the last bits of a tie may be left, and say nothing (p is 0.5).
    even = {key for key, p in kept.items() if abs(p - 0.5) < 1e-9} if mode_name == "listwise" else set()
    dropped["tie"] -= len(even)
    kept = {key: p for key, p in kept.items() if key not in even}
    assert kept == {key: pytest.approx(p, abs=1e-6) for key, p in wanted.items()}
    quality = json.loads((tmp_path / "out" / "quality.json").read_text(encoding="utf-8"))
    assert quality["dropped"] == {reason: count for reason, count in dropped.items() if count}
    assert quality["n_pairs"] == len(wanted) + len(even) + dropped["tie"]
    valid = [p for line in lines for p, _ in mode.expected(line, oracle, votes).values() if p is not None]
    assert quality[mode.bias] == pytest.approx(sum(map(mode.tilt, valid)) / len(valid), abs=1e-5)
    if mode.bias == "position_bias" and oracle.gives == "logprobs":
        assert quality[mode.bias] == pytest.approx(oracle.bias, abs=1e-5)


def test_the_planted_combinations_are_there() -> None:
    """The test above is only worth what its material holds."""
    for name, mode in MODES.items():
        for server, (oracle, votes) in SERVERS.items():
            found = [verdict for line in planted() for verdict in mode.expected(line, oracle, votes).values()]
            reasons = {reason for _, reason in found}
            assert reasons == (
                {None, "http_500", "option_unknown", "uncovered"}
                if oracle.gives == "logprobs"
                else {None, "http_500", "uncovered"}
            ), (name, server)
    logits = [
        worth("kind", a) - worth("kind", b)
        for line in planted()
        for a, b in itertools.combinations(line["completions"], 2)
    ]
    assert {0.0} < {abs(logit) for logit in logits}


# Aggregation alone, over wide inputs.

VALUES = st.floats(-4, 4)


@st.composite
def questioned(draw: Any) -> dict[str, Any]:
    """Candidates with a value under each principle, weights, biases, and verdicts that are missing."""
    principles = draw(st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True))
    candidates = draw(st.lists(st.sampled_from("abcd"), min_size=2, max_size=4, unique=True))
    return {
        "principles": {name: draw(st.floats(0.1, 5)) for name in principles},
        "values": {(name, candidate): draw(VALUES) for name in principles for candidate in candidates},
        "bias": {name: draw(VALUES) for name in principles},
        "candidates": candidates,
        "missing": draw(st.sets(st.integers(0, 40), max_size=4)),
        "order": draw(st.randoms(use_true_random=False)),
        "temperature": draw(st.floats(0.1, 10)),
    }


def verdicts(case: dict[str, Any], mode: str) -> list[Label]:
    places = (
        [
            (name, one, other)
            for name in case["principles"]
            for one, other in itertools.permutations(case["candidates"], 2)
        ]
        if mode == "pairwise"
        else [(name, one, None) for name in case["principles"] for one in case["candidates"]]
    )
    labels = []
    for number, (name, one, other) in enumerate(places):
        against = 0.0 if other is None else case["values"][name, other]
        p: float | None = sigmoid(case["values"][name, one] - against + case["bias"][name])
        reason = None
        if number in case["missing"]:
            p, reason = None, "timeout"
        shown: dict[str, Any] = {"candidate": one} if other is None else {"first": one, "second": other}
        labels.append(Label("p", mode, name, "l", "logprob", p, reason, **shown))
    case["order"].shuffle(labels)
    return labels


@settings(deadline=None, max_examples=300)
@given(questioned(), st.sampled_from(["pairwise", "pointwise"]))
def test_any_oracle_is_recovered_from_its_biased_verdicts(case: dict[str, Any], mode: str) -> None:
    labels = verdicts(case, mode)
    pairs, dropped = pair_labels(labels, case["principles"], case["temperature"])
    failed = {
        (label.principle, label.candidate or frozenset((label.first, label.second)))
        for label in labels
        if label.p is None
    }
    total = sum(case["principles"].values())
    expected = {}
    for one, other in itertools.combinations(sorted(case["candidates"]), 2):
        needed = {
            (name, place)
            for name in case["principles"]
            for place in ([frozenset((one, other))] if mode == "pairwise" else [one, other])
        }
        if not needed & failed:
            difference = sum(
                weight * (case["values"][name, one] - case["values"][name, other])
                for name, weight in case["principles"].items()
            )
            expected[one, other] = pytest.approx(difference / total / case["temperature"], abs=1e-4)
    assert {(pair.one, pair.other): pair.logit for pair in pairs} == expected
    assert len(pairs) == len(expected)
    assert dropped == {"no_verdict": math.comb(len(case["candidates"]), 2) - len(expected)}


@settings(deadline=None, max_examples=100)
@given(questioned(), st.sampled_from(["pairwise", "pointwise"]))
def test_names_and_order_do_not_matter(case: dict[str, Any], mode: str) -> None:
    """Other ids, which turn some pairs round, and another order of verdicts: the same preferences."""
    labels = verdicts(case, mode)
    new = dict(zip("abcd", "dbca", strict=True))
    renamed = [
        replace(label, **{name: new.get(getattr(label, name)) for name in ("first", "second", "candidate")})
        for label in reversed(labels)
    ]
    before, _ = pair_labels(labels, case["principles"])
    after, _ = pair_labels(renamed, case["principles"])
    turned = {(pair.one, pair.other): pair.logit for pair in after} | {
        (pair.other, pair.one): -pair.logit for pair in after
    }
    assert len(after) == len(before)
    for pair in before:
        assert turned[new[pair.one], new[pair.other]] == pytest.approx(pair.logit, abs=1e-9)


# Planted noise has known consequences.

MARGIN, NOISE, BIAS, N = 1.0, 3.0, 2.5, 3000
SPREAD = NOISE / math.sqrt(2)
"""Of the mean of two orders, each with noise of its own."""


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs that differ by one word, and a labeler that sees it through Gaussian noise; as it is, and calibrated.

    Margins are m = +-MARGIN + noise of deviation s, the sign being the truth: P(truth | m) = sigmoid(2 MARGIN m / s^2).
    So the temperature that calibrates is s^2 / (2 MARGIN), and agreement is Phi(MARGIN / s).
    """
    folder = tmp_path_factory.mktemp("noise")
    pairs = []
    for number in range(N):
        longer, shorter = f"text {number} word word", f"text {number} word"
        a, b, label = (longer, shorter, "a") if number % 2 else (shorter, longer, "b")
        pairs.append({"prompt": f"q {number}", "response_a": a, "response_b": b, "label": label})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    result = {}
    for name, temperature in (("raw", 1.0), ("calibrated", SPREAD**2 / (2 * MARGIN))):
        command(
            "audit",
            f"comparisons={folder}/pairs.jsonl",
            "constitution=warm",
            f"output_dir={folder}/{name}",
            "labeler=scripted",
            "labeler.scripted.utility=length",
            f"labeler.scripted.sharpness={MARGIN}",
            f"labeler.scripted.noise={NOISE}",
            f"labeler.scripted.position_bias={BIAS}",
            f"labeling.temperature={temperature}",
        )
        result[name] = json.loads((folder / name / "audit.json").read_text(encoding="utf-8"))
    return result


def temperature_error(temperature: float) -> float:
    """Standard error of a temperature fitted to N margins: from the Fisher information of 1 / T, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    margins = MARGIN + SPREAD * nodes
    p = 1 / (1 + np.exp(-margins / temperature))
    information = N * float((weights * margins**2 * p * (1 - p)).sum() / weights.sum())
    return float(temperature**2 / math.sqrt(information))


@pytest.mark.slow
def test_planted_noise_gives_the_agreement_it_must(audits: dict[str, Any]) -> None:
    share = 0.5 * (1 + math.erf(MARGIN / SPREAD / math.sqrt(2)))
    error = math.sqrt(share * (1 - share) / N)
    for audit in audits.values():
        assert (audit["n_labelled"], audit["missing"]) == (N, 0)
        assert audit["agreement"] == pytest.approx(share, abs=4 * error)
        # Each of the 2 N verdicts has noise of its own around the planted bias.
        assert audit["position_bias"] == pytest.approx(BIAS, abs=4 * NOISE / math.sqrt(2 * N))


@pytest.mark.slow
def test_planted_noise_gives_the_temperature_it_must(audits: dict[str, Any]) -> None:
    wanted = SPREAD**2 / (2 * MARGIN)
    error = temperature_error(wanted)
    assert error < 0.1 * wanted
    assert audits["raw"]["temperature"] == pytest.approx(wanted, abs=4 * error)
    assert audits["calibrated"]["temperature"] == pytest.approx(1.0, abs=4 * error / wanted)
    # A bin with n of the N pairs misses its frequency by 0.8 sqrt(p (1 - p) / n) on average: 0.025 over ten bins.
    assert audits["calibrated"]["ece"] < 0.04
    assert audits["raw"]["ece"] > 0.1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("faults", "mass"), [(0.3, 0.9), (0.0, 0.005)])
def test_the_scripted_labeler_comes_out_as_it_was_scripted(
    mode: str, faults: float, mass: float, tmp_path: Path
) -> None:
    """Logits of half a word each; nothing that failed or is uncovered becomes a preference."""
    texts = [" ".join(["word"] * size) for size in (1, 4, 6, 6)]
    texts = [f"{text} {place}" for place, text in enumerate(texts)]
    lines = [
        {"prompt": f"q {number}", "prompt_id": f"p{number}", "split": "train", "completions": texts}
        for number in range(8)
    ]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    overrides = [
        f"candidates={tmp_path}/candidates.jsonl",
        f"constitution={tmp_path}/planted.yaml",
        f"output_dir={tmp_path}/out",
        "labeler=scripted",
        "labeler.scripted.utility=length",
        "labeler.scripted.sharpness=0.5",
        "labeler.scripted.position_bias=4",
        f"labeler.scripted.fault_rate={faults}",
        f"labeler.scripted.option_mass={mass}",
        f"labeling.mode={mode}",
    ]
    if mass < 0.01:
        result = subprocess.run(
            [sys.executable, "-m", "rlaif.label", *overrides], cwd=REPO, capture_output=True, text=True, timeout=120
        )
        assert result.returncode == 2
        assert "no usable verdict" in result.stderr
        assert "uncovered" in result.stderr
        assert not list(tmp_path.rglob("*.parquet"))
        return
    command("label", *overrides)
    labels = json_lines(tmp_path / "out" / "labels.jsonl")
    words = {f"c{place}": len(text.split()) for place, text in enumerate(texts)}
    failed = set()
    for label in labels:
        if mode == "pairwise":
            place, value = frozenset((label["first"], label["second"])), label["p_first"]
            logit = 0.5 * (words[label["first"]] - words[label["second"]]) + 4
        else:
            place, value, logit = label["candidate"], label["score"], 0.5 * words[label["candidate"]]
        if value is None:
            assert label["reason"] == "scripted_fault"
            failed.add((label["prompt_id"], place))
        else:
            assert value == pytest.approx(sigmoid(logit), abs=1e-9)
    assert bool(failed) == (faults > 0)
    wanted = {}
    for line in lines:
        for one, other in itertools.combinations(words, 2):
            places = [frozenset((one, other))] if mode == "pairwise" else [one, other]
            # c2 and c3 are equally long: a tie, which is no preference either.
            if words[one] != words[other] and not any((line["prompt_id"], place) in failed for place in places):
                # The later one is longer.
                wanted[line["prompt_id"], other, one] = sigmoid(0.5 * (words[other] - words[one]))
    assert preferences(tmp_path) == {key: pytest.approx(p, abs=1e-6) for key, p in wanted.items()}
