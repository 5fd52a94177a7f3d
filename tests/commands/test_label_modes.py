"""Every labeling mode through the commands, with a labeler whose truth is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet
import pytest
from oracle_server import CONSTITUTION

SCRIPTED = ["labeler=scripted", "labeler.scripted.utility=letters", "labeler.scripted.sharpness=12"]
# By mode: verdicts on three candidates under the one principle of warm, and what a line has of its own.
MODES = {
    "score": (3, {"candidate", "score", "probs"}),
    "listwise": (3, {"order", "probs"}),
    "contrastive": (3, {"candidate", "score"}),
}


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mode", MODES)
def test_labels_follow_the_scripted_truth(run_command, inputs, tmp_path, mode):
    out = tmp_path / "out"
    arguments = [f"candidates={inputs}/candidates.jsonl", "constitution=warm", "gold=letters", f"labeling.mode={mode}"]
    bias = "labeler.scripted.position_bias=2"
    run_command("label", *arguments, *SCRIPTED, bias, f"output_dir={out}")
    quality = json.loads((out / "quality.json").read_text())
    verdicts, own = MODES[mode]
    assert quality["mode"] == mode
    assert quality["n_verdicts"] == 40 * verdicts
    assert (quality["agreement"], quality["n_pairs"], quality["failed"]) == (1.0, 120, 0)
    if mode == "listwise":
        assert quality["position_bias"] == pytest.approx(2, abs=1e-3)
        assert 0 <= quality["same_position_rate"] <= 1
    else:
        assert "score_mean" in quality
    labels = lines_of(out / "labels.jsonl")
    assert len(labels) == 40 * verdicts
    assert own <= set(labels[0])
    assert not {"p_first", "first", "second"} & set(labels[0])
    assert (out / "preferences" / "train.parquet").is_file()


@pytest.mark.parametrize("minimum", [0.5, 1.0])
def test_pairs_outlive_refusals_under_some_principles(run_command, tmp_path, minimum):
    """One request in five is refused, so that three of four pairs are without a verdict under some principle."""
    weights = {"x": 1.0, "y": 0.5, "z": 0.25}
    listed = "".join(f"  - {{id: {n}, weight: {w}, question: 'Which is better in {n}?'}}\n" for n, w in weights.items())
    (tmp_path / "three.yaml").write_text(f"name: three\nversion: '1'\ndescription: d\nprinciples:\n{listed}")
    lines = [
        {
            "prompt": f"Question {n}?",
            "prompt_id": f"p{n}",
            "split": "train",
            "completions": ["aei" + "b" * n, "xyz" * n],
        }
        for n in range(1, 61)
    ]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    given = () if minimum == 0.5 else (f"labeling.min_principle_weight={minimum}",)
    run_command(
        "label",
        f"candidates={tmp_path}/candidates.jsonl",
        f"constitution={tmp_path}/three.yaml",
        *("labeler=scripted", "labeler.scripted.fault_rate=0.2", "labeler.scripted.noise=1", *given),
        f"output_dir={out}",
    )
    said: dict = {}
    for label in lines_of(out / "labels.jsonl"):
        sign = 1 if (label["first"], label["second"]) == ("c0", "c1") else -1
        p = label["p_first"]
        logit = None if p is None else sign * math.log(p / (1 - p))
        said.setdefault(label["prompt_id"], {}).setdefault(label["principle"], []).append(logit)
    expected, shares = {}, []
    for name, by_principle in said.items():
        there = {n: sum(both) / 2 for n, both in by_principle.items() if None not in both}
        weight = sum(weights[n] for n in there)
        if weight and weight >= minimum * 1.75:
            logit = sum(weights[n] * value for n, value in there.items()) / weight
            expected[name] = 1 / (1 + math.exp(-abs(logit))), 1 - weight / 1.75, set(there)
            shares.append(1 - weight / 1.75)
    rows = pyarrow.parquet.read_table(out / "preferences" / "train.parquet").to_pylist()
    found = {
        row["prompt_id"]: (row["p_chosen"], row["missing_weight"], set(json.loads(row["principles"]))) for row in rows
    }
    assert found.keys() == expected.keys()
    for name, (p, missing, there) in expected.items():
        assert found[name] == (pytest.approx(p, abs=1e-6), pytest.approx(missing, abs=1e-6), there)
    quality = json.loads((out / "quality.json").read_text())
    assert quality["n_pairs"] == len(expected)
    assert quality["n_partial"] == sum(share > 0 for share in shares)
    assert quality["missing_weight_mean"] == pytest.approx(sum(shares) / len(shares), abs=1e-6)
    assert sum(quality["dropped"].values()) == 60 - len(expected)
    # Combined with itself it is the same.
    both = tmp_path / "both"
    run_command("label", f"combine=[{out},{out}]", f"candidates={tmp_path}/candidates.jsonl", f"output_dir={both}")
    rows = pyarrow.parquet.read_table(both / "preferences" / "train.parquet").to_pylist()
    for row in rows:
        assert (row["p_chosen"], row["missing_weight"]) == pytest.approx(found[row["prompt_id"]][:2], abs=1e-6)
    assert len(rows) == len(found)
    # As docs/label.md says.
    assert len(expected) == (35 if minimum == 0.5 else 15)


@pytest.mark.parametrize("principles", ["sample", "together"])
def test_principles(run_command, inputs, tmp_path, principles):
    out = tmp_path / "out"
    run_command(
        "label",
        f"candidates={inputs}/candidates.jsonl",
        "constitution=harmless",
        f"labeling.principles={principles}",
        *SCRIPTED,
        "gold=letters",
        f"output_dir={out}",
    )
    quality = json.loads((out / "quality.json").read_text())
    # Two orders of three pairs, each under one principle, or under all in one prompt.
    assert (quality["n_verdicts"], quality["agreement"]) == (40 * 3 * 2, 1.0)
    found = {label["principle"] for label in lines_of(out / "labels.jsonl")}
    assert found == {"all"} if principles == "together" else len(found) == 6


@pytest.mark.parametrize("mode", MODES)
def test_an_audit_in_every_mode(run_command, tmp_path, mode):
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"id": str(n), "prompt": f"q {n}", "chosen": f"a much longer reply {n}", "rejected": f"reply {n}"}
        for n in range(20)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_command(
        "audit",
        f"comparisons={file}",
        "constitution=helpful",
        f"labeling.mode={mode}",
        "labeler=scripted",
        "labeler.scripted.utility=length",
        f"output_dir={tmp_path}/out",
    )
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (found["agreement"], found["n_labelled"], found["mode"]) == (1.0, 20, mode)
    assert found["n_verdicts"] == 20 * 2 * 6
    assert found["agreement_principle_clear"] == 1.0


def test_weights_without_effect_are_told(run_command, inputs, tmp_path):
    (tmp_path / "planted.yaml").write_text(CONSTITUTION, encoding="utf-8")
    arguments = [f"candidates={inputs}/candidates.jsonl", f"constitution={tmp_path}/planted.yaml", *SCRIPTED]
    arguments += ["labeling.principles=together", f"output_dir={tmp_path}/out"]
    told = "the principles' weights have no effect"
    assert told in run_command("label", *arguments, "labeling.mode=contrastive").stderr
    assert told not in run_command("label", *arguments, "labeling.mode=score").stderr
