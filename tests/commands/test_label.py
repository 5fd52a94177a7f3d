"""Pairs, ranks, calibration, selection and combination through ``rlaif.label``, with a labeler whose truth is known."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

SCRIPTED = ["constitution=warm", "labeler=scripted", "labeler.scripted.utility=length"]
WORDS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "jay", "owl")


def write_lines(file: Path, lines: list[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "preferences").glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty prompts with six completions of different lengths."""
    rng = random.Random(0)
    lines = [
        {
            "prompt": f"{WORDS[number % 10]} {number} {WORDS[number // 10]} tell me more",
            "completions": [" ".join(rng.choices(WORDS, k=count)) for count in rng.sample(range(1, 13), 6)],
        }
        for number in range(20)
    ]
    return write_lines(tmp_path_factory.mktemp("label") / "candidates.jsonl", lines)


@pytest.fixture(scope="module")
def pairs_of_people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs that differ by 1 to 4 words; people prefer the longer with p = sigmoid(words / 2)."""
    rng = random.Random(1)
    lines = []
    for number in range(300):
        difference = rng.randint(1, 4)
        longer, shorter = " ".join(rng.choices(WORDS, k=3 + difference)), " ".join(rng.choices(WORDS, k=3))
        if rng.random() > 1 / (1 + 2.718281828 ** (-difference / 2)):
            longer, shorter = shorter, longer
        lines.append({"id": f"c{number}", "prompt": f"question {number}", "chosen": longer, "rejected": shorter})
    return write_lines(tmp_path_factory.mktemp("people") / "pairs.jsonl", lines)


def test_adaptive_pairs_and_ranks(run_command, candidates, tmp_path):
    out = tmp_path / "out"
    settings = ["labeling.pairs=adaptive", "labeling.pairs_per_prompt=6", "labeling.rank=true", "gold=length"]
    settings.append("labeler.scripted.sharpness=1")
    result = run_command("label", *SCRIPTED, f"candidates={candidates}", *settings, f"output_dir={out}")
    assert "Traceback" not in result.stderr
    quality = read(out / "quality.json")
    principles = len(quality["principles"])
    # At most 6 of 15 pairs were asked, all have a label, and the rest is marked.
    assert quality["n_verdicts"] + quality["saved"]["pairs"] == 20 * 15 * 2 * principles
    assert quality["n_verdicts"] <= 20 * 6 * 2 * principles
    assert quality["n_pairs"] == 20 * 15
    assert quality["n_inferred"] == 20 * 15 - quality["n_verdicts"] // (2 * principles)
    assert quality["agreement"] > 0.9
    rows = rows_of(out)
    assert sum(row["inferred"] for row in rows) == quality["n_inferred"]
    for row in rows:
        assert 1 <= row["chosen_rank"] < row["rejected_rank"] <= 6
        assert bool(json.loads(row["principles"])) != row["inferred"]


@pytest.mark.slow
def test_an_interrupted_adaptive_run_ends_in_the_same_bytes(run_command, start_command, candidates, tmp_path):
    arguments = [
        *SCRIPTED,
        f"candidates={candidates}",
        "labeling.pairs=adaptive",
        "labeling.second_order_below=6",
        "labeling.rank=true",
        "labeler.scripted.noise=1",
        "labeler.scripted.delay_s=0.01",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_command("label", *arguments, f"output_dir={whole}")
    n_verdicts = read(whole / "quality.json")["n_verdicts"]
    store = tmp_path / ".cut.partial" / "store.sqlite"

    def stored() -> int:
        try:
            with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=5) as connection:
                return int(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
        except sqlite3.OperationalError:
            return 0

    process = start_command("label", *arguments, f"output_dir={cut}")
    deadline = time.monotonic() + 90
    # Beyond the first round: three pairs of each of 20 prompts in one order.
    while stored() < n_verdicts // 2:
        assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(90)
    assert not cut.exists()
    assert stored() < n_verdicts
    run_command("label", *arguments, f"output_dir={cut}")
    for file in ("labels.jsonl", "preferences/train.parquet", "preferences/README.md"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()


def test_calibration(run_command, candidates, pairs_of_people, tmp_path):
    out = tmp_path / "out"
    # 2 logits a word, and people's logit is half a word: the temperature is 4.
    run_command(
        "label",
        *SCRIPTED,
        "labeler.scripted.sharpness=2",
        "labeler.scripted.position_bias=1.5",
        f"candidates={candidates}",
        f"labeling.calibrate={pairs_of_people}",
        f"output_dir={out}",
    )
    record = read(out / "calibration.json")
    assert record["temperature_low"] < 4 < record["temperature_high"]
    assert record["temperature_n"] == 300
    assert record["bias"] == pytest.approx(1.5, abs=0.01)
    assert read(out / "quality.json")["calibration"] == record
    by_ids = {(row["prompt_id"], frozenset((row["chosen_id"], row["rejected_id"]))): row for row in rows_of(out)}
    for row in by_ids.values():
        words = len(row["chosen"][0]["content"].split()) - len(row["rejected"][0]["content"].split())
        if words < 6:
            expected = 1 / (1 + 2.718281828 ** (-2 * words / record["temperature"]))
            assert row["p_chosen"] == pytest.approx(expected, abs=2e-3)


def test_the_gate_audits_the_labeler_that_will_label(run_command, candidates, pairs_of_people, tmp_path):
    """One order with a bias that outweighs every difference: without the calibration it agrees with nobody."""
    arguments = [
        *(*SCRIPTED, f"candidates={candidates}", f"labeler.audit={pairs_of_people}"),
        *("labeling.both_orders=false", "labeler.scripted.position_bias=6", "labeler.scripted.sharpness=1"),
    ]
    for name, more in (("plain", []), ("calibrated", [f"labeling.calibrate={pairs_of_people}"])):
        run_command("label", *arguments, *more, f"output_dir={tmp_path / name}")
    plain, calibrated = (read(tmp_path / name / "audit" / "audit.json") for name in ("plain", "calibrated"))
    assert calibrated["agreement"] > plain["agreement"] + 0.1


def test_a_labeler_without_a_clue_is_not_calibrated(run_command, candidates, pairs_of_people, tmp_path):
    out = tmp_path / "out"
    arguments = [*SCRIPTED, "labeler.scripted.utility=brevity", f"candidates={candidates}", f"output_dir={out}"]
    result = run_command("label", *arguments, f"labeling.calibrate={pairs_of_people}", expect=2)
    assert "do not clearly follow people's choices on these 300 prompts" in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_length_balance(run_command, candidates, tmp_path):
    def lengths(folder: Path) -> list[int]:
        return [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows_of(folder)]

    arguments = [*SCRIPTED, f"candidates={candidates}", "labeler.scripted.noise=8"]
    run_command("label", *arguments, f"output_dir={tmp_path}/all")
    balanced = ["labeling.selection=length_balanced", "data.validation_fraction=0", "data.test_fraction=0"]
    run_command("label", *arguments, *balanced, f"output_dir={tmp_path}/balanced")
    before, after = lengths(tmp_path / "all"), lengths(tmp_path / "balanced")
    more, fewer = sum(d > 0 for d in before), sum(d < 0 for d in before)
    assert more > fewer > 0
    assert sum(d > 0 for d in after) == sum(d < 0 for d in after) == fewer
    assert sum(d == 0 for d in after) == sum(d == 0 for d in before)
    assert read(tmp_path / "balanced" / "quality.json")["dropped"]["length_balance"] == more - fewer
    # Another seed drops others, as many.
    run_command("label", *arguments, *balanced, "seed=1", f"output_dir={tmp_path}/other")
    assert not list((tmp_path / "balanced").glob("*.jsonl.*"))


@pytest.fixture(scope="module")
def two_runs(run_command, candidates, tmp_path_factory) -> Path:
    """Two labelers of the same candidates: one likes length, and is unsure; the other one likes vowels."""
    here = tmp_path_factory.mktemp("runs")
    arguments = [*SCRIPTED, f"candidates={candidates}"]
    run_command("label", *arguments, "labeler.scripted.sharpness=0.5", f"output_dir={here}/length")
    vowels = ["labeler.scripted.utility=letters", "labeler.scripted.sharpness=3", "labeling.pairs=against_best"]
    run_command("label", *arguments, *vowels, f"output_dir={here}/vowels")
    return here


def test_two_labelers_are_combined(run_command, candidates, two_runs, tmp_path):
    out = tmp_path / "out"
    arguments = [f"candidates={candidates}", f"combine=[{two_runs}/length,{two_runs}/vowels]", f"output_dir={out}"]
    run_command("label", *arguments, "combine_weights=[3,1]")
    quality = read(out / "quality.json")
    assert quality["labeler"] == "combined(scripted, scripted)"
    # The second labeler was asked about 5 of the 15 pairs.
    assert quality["n_pairs"] == 20 * 5
    assert quality["dropped"]["not_by_all"] == 20 * 10
    [between] = quality["between_labelers"]
    assert 0 < between["agreement_low"] <= between["agreement"] <= between["agreement_high"] < 1
    assert 18 <= between["agreement_n"] <= 20
    assert [(row["folder"], row["weight"]) for row in quality["labelers"]] == [
        (f"{two_runs}/length", 3.0),
        (f"{two_runs}/vowels", 1.0),
    ]
    # All verdicts are kept.
    kept = sorted((out / "labels.jsonl").read_text().splitlines())
    assert kept == sorted(
        line for name in ("length", "vowels") for line in (two_runs / name / "labels.jsonl").read_text().splitlines()
    )
    one, other = ({ids(row): logit(row) for row in rows_of(two_runs / name)} for name in ("length", "vowels"))
    rows = rows_of(out)
    assert rows
    for row in rows:
        assert logit(row) == pytest.approx((3 * one.get(ids(row), 0.0) + other.get(ids(row), 0.0)) / 4, abs=1e-4)
    assert "up to date" in run_command("label", *arguments, "combine_weights=[3,1]").stderr


def test_combining_keeps_what_was_asked_and_sees_how_its_sources_weigh(run_command, candidates, two_runs, tmp_path):
    """A folder's paid verdicts stay in it, and a source's temperature is not in its labels.jsonl."""
    out = tmp_path / "out"
    shutil.copytree(two_runs / "length", out)
    shutil.copytree(two_runs / "length", tmp_path / "third")
    arguments = [f"candidates={candidates}", f"combine=[{two_runs}/vowels,{tmp_path}/third]", f"output_dir={out}"]
    run_command("label", *arguments)
    assert (out / "store.sqlite").is_file()
    assert "up to date" in run_command("label", *arguments).stderr
    before = rows_of(out)
    again = [*SCRIPTED, f"candidates={candidates}", "labeler.scripted.sharpness=0.5", "labeling.temperature=4"]
    run_command("label", *again, f"output_dir={tmp_path}/third")
    assert "up to date" not in run_command("label", *arguments).stderr
    assert rows_of(out) != before


def ids(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["prompt_id"], *sorted((row["chosen_id"], row["rejected_id"])))


def logit(row: dict[str, Any]) -> float:
    """Of the alphabetically first candidate."""
    value = math.log(row["p_chosen"] / (1 - row["p_chosen"]))
    return value if row["chosen_id"] < row["rejected_id"] else -value


def test_what_cannot_be_combined(run_command, candidates, two_runs, tmp_path):
    other = write_lines(
        tmp_path / "other.jsonl", [json.loads(line) for line in candidates.read_text().splitlines()][:-1]
    )
    cases = {
        "labels other candidates than candidates=": [f"candidates={other}"],
        "combine=[": [f"candidates={candidates}", f"combine=[{two_runs}/length]"],
        "leave labeler out": [f"candidates={candidates}", "labeler=scripted"],
        "give one weight for each of the 2 folders": [f"candidates={candidates}", "combine_weights=[1]"],
        "no such folder": [f"candidates={candidates}", f"combine=[{two_runs}/length,{tmp_path}/none]"],
        "labeler.audit=x: combine= takes": [f"candidates={candidates}", "labeler.audit=x"],
        "labeling.calibrate=x: combine= takes": [f"candidates={candidates}", "labeling.calibrate=x"],
        "is one of the folders of combine=": [f"candidates={candidates}", f"output_dir={two_runs}/vowels"],
        "labels.jsonl: no such file": [f"candidates={candidates}", f"combine=[{two_runs}/length,{tmp_path}]"],
    }
    for message, arguments in cases.items():
        if not any(argument.startswith("combine=") for argument in arguments):
            arguments = [f"combine=[{two_runs}/length,{two_runs}/vowels]", *arguments]
        result = run_command("label", f"output_dir={tmp_path}/out", *arguments, expect=2)
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists()
    assert (two_runs / "vowels" / "store.sqlite").is_file()
