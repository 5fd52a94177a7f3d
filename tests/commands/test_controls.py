"""Labels for controls: by the styles of the candidates, and the AI's turned round by a coin."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

STYLES = ("warm", "plain", "gloomy")
AI = ["constitution=warm", "labeler=scripted", "labeler.scripted.utility=length"]


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty prompts with a completion in each style and a second one in the last."""
    file = tmp_path_factory.mktemp("controls") / "candidates.jsonl"
    lines = []
    for number in range(80):
        completions = [
            {
                "candidate_id": f"{style}-{place}",
                "completion": f"{style} {number} " + "x " * (number * 7 % 11 + place),
                "style": style,
            }
            for place, style in enumerate((*STYLES, STYLES[-1]))
        ]
        lines.append({"prompt": f"question {number}", "prompt_id": f"p{number}", "candidates": completions})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def rows_of(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "preferences").glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def quality_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "quality.json").read_text(encoding="utf-8"))


def pair_of(row: dict[str, Any]) -> tuple[str, frozenset[str]]:
    return row["prompt_id"], frozenset((row["chosen_id"], row["rejected_id"]))


def test_the_order_of_the_styles_decides(run_command, candidates, tmp_path):
    order = ["feedback=style_order", "style_order=[warm,plain,gloomy]", "labeling.selection=all_pairs"]
    run_command("label", f"candidates={candidates}", *order, f"output_dir={tmp_path}/out")
    rows = rows_of(tmp_path / "out")
    # Of the six pairs of four candidates one is of two gloomy ones.
    assert len(rows) == 80 * 5
    assert {row["feedback"] for row in rows} == {"style_order"}
    for row in rows:
        better, worse = row["chosen_id"].split("-")[0], row["rejected_id"].split("-")[0]
        assert STYLES.index(better) < STYLES.index(worse)
        assert row["p_chosen"] == pytest.approx(1, abs=1e-5)
    assert quality_of(tmp_path / "out")["mode"] == "style_order"


def test_a_coin_turns_the_labels_of_a_run_round(run_command, candidates, tmp_path):
    every = "labeling.selection=all_pairs"
    run_command("label", f"candidates={candidates}", *AI, every, f"output_dir={tmp_path}/ai")
    shuffled = ["label", f"candidates={candidates}", "feedback=shuffled", f"shuffle={tmp_path}/ai", every]
    run_command(*shuffled, f"output_dir={tmp_path}/one")
    run_command(*shuffled, f"output_dir={tmp_path}/other", "seed=1")
    labels = {pair_of(row): row for row in rows_of(tmp_path / "ai")}
    turned = {}
    for name in ("one", "other"):
        rows = rows_of(tmp_path / name)
        assert {row["feedback"] for row in rows} == {"shuffled"}
        assert {pair_of(row) for row in rows} == set(labels)
        for row in rows:
            assert row["p_chosen"] == pytest.approx(labels[pair_of(row)]["p_chosen"])
        turned[name] = [row["chosen_id"] != labels[pair_of(row)]["chosen_id"] for row in rows]
    n = len(labels)
    # A fair coin: within four standard deviations of half.
    for flips in turned.values():
        assert abs(sum(flips) - n / 2) < 4 * math.sqrt(n) / 2
    # Another seed is another coin.
    agree = sum(one == other for one, other in zip(*turned.values(), strict=True))
    assert abs(agree - n / 2) < 4 * math.sqrt(n) / 2
    assert "up to date" in run_command(*shuffled, f"output_dir={tmp_path}/one").stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["feedback=style_order"], "at least two, the best first"),
        (["feedback=style_order", "style_order=[warm,plain]"], "has style 'gloomy'"),
        (["feedback=style_order", "style_order=[warm,warm]"], "names a style twice"),
        (["feedback=shuffled"], "shuffle=DIR"),
        (["feedback=shuffled", "shuffle=none"], "shuffle=none: no such folder"),
        ([*AI, "shuffle=none"], "shuffle=DIR"),
    ],
)
def test_what_is_no_control(run_command, candidates, tmp_path, settings, words):
    result = run_command("label", f"candidates={candidates}", *settings, f"output_dir={tmp_path}/out", expect=2)
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_controls_are_arms_of_a_run(run_command, tmp_path):
    """The AI's labels are made for the shuffled ones, though no arm trains on them."""
    arms = [f"~arms.{name}" for name in ("rlaif_ppo", "rlhf_ppo", "dpo")]
    arms += ["+arms.shuffled={method: dpo, feedback: shuffled}", "+arms.style={method: dpo, feedback: style_order}"]
    styles = ["sampling.styles.plain.n=2", "+sampling.styles.warm={system: Be warm., n: 1}", "style_order=[warm,plain]"]
    run_command("run", "experiment=smoke", *arms, *styles, "dpo.max_steps=2", f"output_dir={tmp_path}/out")
    for feedback in ("ai", "shuffled", "style_order"):
        assert rows_of(tmp_path / "out" / "labels" / feedback)
    for arm in ("shuffled", "style"):
        metrics = json.loads((tmp_path / f"out/arms/{arm}/evaluation/metrics.json").read_text(encoding="utf-8"))
        assert metrics["feedback"] == {"shuffled": "shuffled", "style": "style_order"}[arm]
    assert "style order, a control" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
