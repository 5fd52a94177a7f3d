"""The scripted labeler comes out as it was scripted, and planted noise has the consequences that it must."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle_labels import MODES, Contrastive, Reasoned, check, command, json_lines, logits, sigmoid, write_lines
from oracle_server import CONSTITUTION, WEIGHTS, shares

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
    write_lines(folder / "pairs.jsonl", pairs)
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


SCRIPTED = MODES | {
    "contrastive": Contrastive(),
    "rationales": Reasoned(2, 0.1, {}),
    "sure rationales": Reasoned(3, 0.0, {}),
}


def scripted(mode_name: str, key: tuple[str, ...], words: dict[str, int]) -> Any:
    """The verdict of a labeler with half a logit for each word, and four for what is shown first."""
    logit = {name: 0.5 * size for name, size in words.items()}
    if mode_name == "pairwise":
        return sigmoid(logit[key[1]] - logit[key[2]] + 4)
    if "rationales" in mode_name:
        clamp = SCRIPTED[mode_name].clamp
        return min(max(sigmoid(logit[key[1]] - logit[key[2]] + 4), clamp), 1 - clamp)
    if mode_name == "pointwise":
        return sigmoid(logit[key[1]])
    if mode_name == "score":
        p = sigmoid(logit[key[1]])
        return [math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9)]
    if mode_name == "listwise":
        return shares([logit[name] for name in key[1:]], 4)
    return logit[key[1]]


@pytest.mark.parametrize("mode_name", SCRIPTED)
@pytest.mark.parametrize(("faults", "mass"), [(0.1, 0.9), (0.0, 0.005)])
def test_the_scripted_labeler_comes_out_as_it_was_scripted(
    mode_name: str, faults: float, mass: float, tmp_path: Path
) -> None:
    """Nothing that failed or is uncovered becomes a preference; the bias is in no pair that is not clipped."""
    mode = SCRIPTED[mode_name]
    texts = [f"{' '.join(['word'] * size)} {place}" for place, size in enumerate((1, 4, 6, 6))]
    lines = [
        {"prompt": f"q {number}", "prompt_id": f"p{number}", "split": "train", "completions": texts}
        for number in range(8)
    ]
    write_lines(tmp_path / "candidates.jsonl", lines)
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
        *mode.overrides,
    ]
    if mass < 0.01 and mode_name != "contrastive":
        result = command("label", *overrides, code=2)
        assert "no usable verdict" in result.stderr
        assert "uncovered" in result.stderr
        assert not list(tmp_path.rglob("*.parquet"))
        return
    command("label", *overrides)
    words = {f"c{place}": len(text.split()) for place, text in enumerate(texts)}
    # What failed is chance; what did not is known, and so is every preference that follows.
    expected: dict[str, Any] = {line["prompt_id"]: {} for line in lines}
    for entry in json_lines(tmp_path / "out" / "labels.jsonl"):
        key = mode.key(entry)
        failed = entry.get(mode.value) is None
        assert not failed or faults
        value = None if failed else scripted(mode_name, key, words)
        expected[entry["prompt_id"]][key] = (value, "scripted_fault" if failed else None)
    assert {len(found) for found in expected.values()} == {
        len(WEIGHTS) * {"pairwise": 12, "rationales": 12, "sure rationales": 12}.get(mode_name, 4)
    }
    reasons = {reason for found in expected.values() for _, reason in found.values()}
    assert reasons == ({None, "scripted_fault"} if faults else {None})
    check(tmp_path / "out", mode, expected)
    for found in expected.values():
        for one, other in itertools.combinations(words, 2):
            value = logits(mode, found, one, other)
            if value is not None and mode_name not in ("score", "rationales"):
                assert value == pytest.approx(0.5 * (words[one] - words[other]), abs=1e-6)
