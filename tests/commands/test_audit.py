"""``rlaif.audit`` and the gate in ``rlaif.label``, through the commands, with a labeler whose truth is known."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from rlaif.audit import between_labelers
from rlaif.labeling.audit import Comparison
from rlaif.records import Prompt

HUMAN_DATA = Path(os.environ.get("RLAIF_HUMAN_DATA", Path(__file__).parents[3] / "shared" / "data"))
SCRIPTED = [
    "constitution=warm",
    "labeler=scripted",
    "labeler.scripted.utility=length",
    "labeler.scripted.sharpness=0.5",
]


@pytest.fixture(scope="module")
def human_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which people preferred the longer one, four times out of five."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for number in range(60):
        longer, shorter = f"a longer reply number {number}", f"reply {number}"
        chosen, rejected = (shorter, longer) if number % 5 == 0 else (longer, shorter)
        lines.append({"id": f"c{number}", "prompt": f"question {number}", "chosen": chosen, "rejected": rejected})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_an_audit_recovers_what_was_planted(run_command, human_pairs, tmp_path):
    biased = ["labeler.scripted.position_bias=3", f"comparisons={human_pairs}", f"output_dir={tmp_path}/biased"]
    result = run_command("audit", *SCRIPTED, *biased)
    found = json.loads((tmp_path / "biased" / "audit.json").read_text())
    assert found["agreement"] == pytest.approx(0.8)
    assert found["agreement_low"] < 0.8 < found["agreement_high"]
    assert found["position_bias"] == pytest.approx(3, abs=1e-3)
    assert found["longer_wins"] == pytest.approx(0.8)
    assert found["n_verdicts"] == 120
    assert "not shown to be better than preferring the longer completion" in result.stderr
    page = (tmp_path / "biased" / "audit.md").read_text()
    assert "| agreement with people | 80.0% |" in page
    assert (tmp_path / "biased" / "reliability.svg").read_text().startswith("<svg xmlns=")
    # Again: up to date, and all is still said.
    again = run_command("audit", *SCRIPTED, *biased)
    assert "up to date" in again.stderr
    for said in (result.stderr, again.stderr):
        assert said.count(found["verdict"]) == 1
        for name, value in (
            ("agreement with people", r"80\.0% +\[68\.2%, 88\.2%\] +60"),
            ("same position named in both orders", r"\d+\.\d% +\[.*\] +60"),
            ("position bias \\(logits, for the first\\)", r"\+3\.00 +\[\+3\.00, \+3\.00\] +60"),
            ("Cohen's kappa", r"0\.\d{3}"),
            ("expected calibration error", r"0\.\d{3}"),
            ("where people preferred the shorter completion", r"0\.0% +\[0\.0%, 24\.2%\] +12"),
            ("ties of the labeler \\(count half\\)", r"0 +0\.0%"),
            ("failed verdicts, unparsed ones included", r"0 +0\.0%"),
        ):
            assert re.search(f"^  {name} +{value}", said, re.MULTILINE), (name, said)


def test_a_contrary_labeler_is_reported_and_all_are_compared(run_command, human_pairs, tmp_path):
    run_command("audit", *SCRIPTED, f"comparisons={human_pairs}", f"output_dir={tmp_path}/one")
    third = ["labeling.mode=listwise", "max_pairs=30"]
    run_command("audit", *SCRIPTED, *third, f"comparisons={human_pairs}", f"output_dir={tmp_path}/three")
    result = run_command(
        "audit",
        *SCRIPTED,
        "labeler.scripted.utility=brevity",
        f"comparisons={human_pairs}",
        f"output_dir={tmp_path}/two",
        f"compare=[{tmp_path}/one,{tmp_path}/three]",
    )
    assert "DO NOT TRAIN ON THESE LABELS: the labeler agrees with people less often than a coin" in result.stderr
    found = json.loads((tmp_path / "two" / "audit.json").read_text())
    assert [(row["folder"], row["mode"]) for row in found["labelers"]] == [
        (".", "pairwise"),
        (f"{tmp_path}/one", "pairwise"),
        (f"{tmp_path}/three", "listwise"),
    ]
    between = {(row["one"], row["other"]): (row["agreement"], row["agreement_n"]) for row in found["between_labelers"]}
    assert between == {
        (".", f"{tmp_path}/one"): (0.0, 60),
        (".", f"{tmp_path}/three"): (0.0, 30),
        (f"{tmp_path}/one", f"{tmp_path}/three"): (1.0, 30),
    }
    page = (tmp_path / "two" / "audit.md").read_text()
    for text in (result.stderr, page.replace("\\", "")):
        assert re.search(r"same side as labeler +(\| )?1 +(\| )?2 +(\| )?3", text)
        assert re.search(r"1 scripted, pairwise \(\.\) +(\| )?– +(\| )?0\.0% \[0\.0%, 6\.0%\] n=60", text)


def test_an_audit_of_other_pairs_is_refused_before_anything_is_asked(run_command, human_pairs, tmp_path):
    run_command("audit", *SCRIPTED, f"comparisons={human_pairs}", f"output_dir={tmp_path}/one", "max_pairs=4")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "else", "chosen": "x y", "rejected": "z"}) + "\n")
    arguments = [f"comparisons={other}", f"output_dir={tmp_path}/two", f"compare=[{tmp_path}/one]"]
    # A server that does not exist would be complained about, if it were looked for.
    server = ["labeler=openai", "labeler.base_url=http://127.0.0.1:9/v1", "labeler.model=m"]
    result = run_command("audit", "constitution=warm", *server, *arguments, expect=2)
    assert "no pair in common with this audit" in result.stderr


def test_agreement_between_labelers_counts_prompts(tmp_path):
    comparisons = [Comparison(str(n), Prompt(f"p{n // 10}", ()), "a", "b", 1) for n in range(40)]
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        lines = [
            {"id": one.name, "logit": 1.0 if name == "own" or n < 20 else -1.0} for n, one in enumerate(comparisons)
        ]
        (tmp_path / name / "comparisons.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "audit.json").write_text('{"labeler": "x"}')
    [found] = between_labelers(tmp_path / "own", [tmp_path / "other"], comparisons)
    assert (found["agreement"], found["agreement_n"]) == (0.5, 4)
    # Four prompts, two of which agree: 40 independent pairs would give 0.35 to 0.65.
    assert found["agreement_low"] < 0.2


def test_labels_are_refused_below_the_agreement_asked_for(run_command, human_pairs, tmp_path):
    candidates = tmp_path / "candidates.jsonl"
    lines = [{"prompt": f"What is {n} times {n + 1}?", "completions": ["Much.", "That is a lot."]} for n in range(20)]
    candidates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [*SCRIPTED, f"candidates={candidates}", f"labeler.audit={human_pairs}"]
    out = tmp_path / "out"
    result = run_command("label", *arguments, "labeler.min_agreement=0.9", f"output_dir={out}", expect=2)
    assert "labeler.min_agreement=0.9" in result.stderr
    assert "on 80.0% of 60 pairs" in result.stderr
    assert "Traceback" not in result.stderr
    [file] = re.findall(r"\(the audit: (.*/audit\.md)\)", result.stderr)
    assert "80.0%" in Path(file).read_text()
    assert not out.exists()
    run_command("label", *arguments, "labeler.min_agreement=0.7", f"output_dir={out}")
    assert json.loads((out / "audit" / "audit.json").read_text())["agreement"] == pytest.approx(0.8)
    # A gate that is raised later is not taken for passed.
    run_command("label", *arguments, "labeler.min_agreement=0.9", f"output_dir={out}", expect=2)


def test_nobody_can_miss_that_the_labels_are_not_to_be_trained_on(run_command, human_pairs, tmp_path):
    candidates = tmp_path / "candidates.jsonl"
    lines = [{"prompt": f"What is {n} times {n + 1}?", "completions": ["Much.", "That is a lot."]} for n in range(20)]
    candidates.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [*SCRIPTED, f"candidates={candidates}", f"labeler.audit={human_pairs}"]
    result = run_command("label", *arguments, "labeler.scripted.utility=brevity", f"output_dir={tmp_path}/bad")
    quality = json.loads((tmp_path / "bad" / "quality.json").read_text())
    audit = json.loads((tmp_path / "bad" / "audit" / "audit.json").read_text())
    assert quality["audit_trainable"] is False
    assert quality["audit_verdict"] == audit["verdict"]
    assert (quality["audit_agreement"], quality["audit_agreement_n"]) == (pytest.approx(0.2), 60)
    assert quality["audit_agreement_high"] < 0.5
    card = (tmp_path / "bad" / "preferences" / "README.md").read_text()
    for fact in ('mode: "pairwise"', 'constitution: "warm"', 'constitution_version: "1"', "seed: 0", 'rlaif: "'):
        assert f"\n- {fact}" in card
    assert f'\n- audit_verdict: "{audit["verdict"]}"' in card
    # With the figures before any label, and as the summary's last line.
    before, _, after = result.stderr.partition("preferences from")
    said = "DO NOT TRAIN ON THESE LABELS: the labeler agrees with people less often than a coin"
    assert said in before
    *_, last, done = after.strip().splitlines()
    assert said in last
    assert "label: done" in done


def test_failed_requests_are_asked_again(run_command, human_pairs, tmp_path):
    arguments = [*SCRIPTED, f"comparisons={human_pairs}", f"output_dir={tmp_path}/out"]
    run_command("audit", *arguments, "labeler.scripted.fault_rate=0.2")
    first = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert first["failed"] > 0
    assert "pairs had no label" in first["verdict"]
    again = run_command("audit", *arguments, "labeler.scripted.fault_rate=0.2")
    assert "up to date" not in again.stderr


@pytest.mark.skipif(not HUMAN_DATA.is_dir(), reason="no human preference data beside the checkout")
@pytest.mark.parametrize("name", ["llmbar", "pandalm_human", "tulu_human_eval", "hh_harmless_test", "hh_helpful_test"])
def test_human_data_is_read_and_measured(run_command, tmp_path, name):
    [file] = HUMAN_DATA.glob(f"{name}.jsonl*")
    run_command("audit", *SCRIPTED, f"comparisons={file}", "max_pairs=100", f"output_dir={tmp_path}/out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    # This labeler prefers the longer completion by words, the rule counts characters.
    assert found["agreement"] == pytest.approx(found["longer_wins"], abs=0.12)
    assert ("human_ceiling" in found) == (name in ("pandalm_human", "tulu_human_eval"))
