"""Run folders in, report out: numbers, verdicts and warnings."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from report_runs import build, change, metrics, samples, write

from rlaif.records import UserError
from rlaif.reporting import write_report
from rlaif.reporting.collect import Estimate, collect
from rlaif.reporting.plots import plot_groups
from rlaif.reporting.statement import verdict, warnings
from rlaif.reporting.tables import comparison, examples
from rlaif.reporting.text import estimate_text


def report(*roots: Path, **changes: object) -> tuple[str, str]:
    """The HTML and the Markdown of a report on ``roots``."""
    output = roots[0].parent / "report"
    settings: dict = {"title": "A title", "baseline": "base", "examples": 10, "seed": 0, **changes}
    html, markdown = write_report(list(roots), output, **settings)
    assert (html.name, markdown.name) == ("report.html", "report.md")
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "report.md"]
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.3, "better"),
        (-0.3, -0.1, "worse"),
        (-0.1, 0.3, "no clear difference (interval includes zero)"),
        (0.0, 0.3, "no clear difference (interval includes zero)"),
        (None, None, "no verdict (no interval was recorded)"),
    ],
)
def test_verdict_follows_the_interval(low: float | None, high: float | None, words: str) -> None:
    assert verdict(Estimate(0.1, 10, low, high)) == words


def test_verdict_on_a_win_rate_compares_with_even() -> None:
    assert verdict(Estimate(0.52, 10, 0.45, 0.6), 0.5) == "no clear difference (interval includes 0.5)"
    assert verdict(Estimate(0.4, 10, 0.3, 0.45), 0.5) == "worse"


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.41, 128, 0.36, 0.46), "0.41 [0.36, 0.46] (n=128)"),
        (Estimate(0.3, 5), "0.30 [no interval] (n=5)"),
        (Estimate(31.5, None, 30.0, 33.0), "31.5 [30.0, 33.0] (n not recorded)"),
        (Estimate(0.2, 9, 0.001, 0.4), "0.200 [0.001, 0.400] (n=9)"),
        (Estimate(-0.0, 9, -1.0, 1.0), "0.00 [-1.00, 1.00] (n=9)"),
        (None, "–"),
    ],
)
def test_estimates_show_n_and_interval(estimate: Estimate | None, text: str) -> None:
    assert estimate_text(estimate) == text


def test_comparison_has_a_row_a_seed_and_a_mean(run: Path) -> None:
    table = comparison(collect([run]), "base")
    rows = [dict(zip(table.columns, row.cells, strict=True)) for row in table.rows]
    assert [(row["row"], row["seed"]) for row in rows[:4]] == [
        ("base", "1"),
        ("base", "2"),
        ("base", "mean of 2 seeds"),
        ("dpo", "1"),
    ]
    ours = [row for row in rows if row["row"] == "rlaif_ppo"]
    assert ours[0]["gold gain"] == "0.41 [0.36, 0.46] (n=128)"
    assert ours[1]["gold gain"] == "0.51 [0.46, 0.56] (n=128)"
    assert ours[2]["gold gain"] == "0.46 (2 seeds, 0.41 to 0.51)"
    assert rows[0]["gold gain"] == "–"
    assert "PM score" not in table.columns


def test_runs_of_one_seed_get_no_mean(run: Path) -> None:
    change(run / "seed=2" / "arms" / "dpo" / "evaluation" / "metrics.json", seed=1)
    html, markdown = report(run)
    for text in (html, markdown):
        assert "dpo: several runs share a seed or have none, so no mean is given." in text
    dpo = [row for row in comparison(collect([run]), "base").rows if row.cells[0].startswith("dpo")]
    assert [row.summary for row in dpo] == [False, False]


def test_statement_says_what_the_numbers_say(run: Path) -> None:
    html, markdown = report(run)
    for text in (html, markdown):
        assert "rlaif_ppo (feedback: AI): gold score gain over base 0.46 (2 seeds, 0.41 to 0.51)" in text
        assert "in the mean: better in 2 of 2 seeds" in text
        assert "seed 1 0.02 [-0.03, 0.07] (n=128): no clear difference (interval includes zero)" in text
        assert "in the mean: worse in 2 of 2 seeds" in text
        assert "simulated_human, programmatic annotator, not people" in text


def test_any_row_may_be_the_baseline(run: Path) -> None:
    """Gains over it come from the samples of both: over `base` the rows gain 0.41 and -0.2, so 0.61 over each other."""
    html, markdown = report(run, baseline="rlhf_ppo")
    for text in (html, markdown):
        assert "rlaif_ppo (feedback: AI): gold score gain over rlhf_ppo 0.61 (2 seeds, 0.61 to 0.61)" in text
        assert "rlaif_ppo: win rate against rlhf_ppo 1.00 (2 seeds" in text
        assert "base: gold score gain over rlhf_ppo 0.15 (2 seeds, 0.10 to 0.20)" in text
    table = comparison(collect([run]), "rlhf_ppo")
    rows = {row.cells[0]: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows if row.starts}
    assert rows["dpo"]["gold gain"].startswith("0.22")
    # What its own evaluation measured keeps its name.
    assert rows["dpo"]["gold gain over start"].startswith("0.02 ")
    assert rows["rlhf_ppo"]["gold gain"] == "–"
    assert "gold gain over start" not in comparison(collect([run]), "base").columns


def row(root: Path, name: str, scores: dict[str, list[float]], seed: int = 0, **values: object) -> Path:
    """An evaluation with these gold scores of each prompt's samples."""
    lines = [
        {"prompt_id": prompt, "prompt": f"{prompt}?", "completion": "text", "sample": number, "gold_score": score}
        for prompt, of_samples in scores.items()
        for number, score in enumerate(of_samples)
    ]
    write(root / name / "samples.jsonl", lines)
    write(root / name / "metrics.json", {"name": name, "seed": seed, "gold": "vader", "length": 9.0, **values})
    return root / name


def over(root: Path, name: str, baseline: str) -> tuple[dict[str, float], str]:
    found = collect([root])
    compared = found.over(found.group(name)[0], baseline)
    return {key: round(estimate.value, 6) for key, estimate in compared.figures.items()}, compared.problem


def test_rows_are_paired_by_prompt_and_sample(tmp_path: Path) -> None:
    row(tmp_path, "one", {"a": [0.1, 0.5], "b": [0.3], "c": [0.9]})
    row(tmp_path, "two", {"a": [0.4, 0.5], "b": [0.1, 0.8], "d": [0.0]})
    # Gains -0.3, 0 and 0.2: a loss, a tie and a win.
    assert over(tmp_path, "one", "two") == ({"gold_gain": -0.033333, "win_rate": 0.5}, "")
    estimate = collect([tmp_path]).over(collect([tmp_path]).group("one")[0], "two").figures["gold_gain"]
    assert estimate.n == 2


def test_rows_that_share_no_prompts_are_not_compared(tmp_path: Path) -> None:
    figures = {"gold_gain": 0.4, "gold_gain_n": 2, "gold_gain_low": 0.3, "gold_gain_high": 0.5}
    row(tmp_path, "one", {"a": [0.1]}, **figures)
    row(tmp_path, "two", {"b": [0.2]}, **figures)
    assert over(tmp_path, "one", "two") == ({}, "they share no prompts")
    for text in report(tmp_path, baseline="two"):
        assert "one: not compared with two: they share no prompts. " in text
        assert "one: gold score gain over the policy it started from 0.40 [0.30, 0.50] (n=2): better." in text
        assert "over two" not in text
    assert "gold gain" not in comparison(collect([tmp_path]), "two").columns


def test_what_cannot_be_paired_has_no_figure(tmp_path: Path) -> None:
    one = row(tmp_path, "one", {"a": [0.1], "b": [0.2]})
    other = row(tmp_path, "other", {"a": [0.1]})
    assert over(tmp_path, "one", "other")[0] == {"gold_gain": 0.0, "win_rate": 0.5}
    lines = [{"prompt_id": "a", "prompt": "another text", "completion": "x", "gold_score": 1.0}]
    write(other / "samples.jsonl", lines)
    assert over(tmp_path, "one", "other") == ({}, "the same prompt ids stand for other texts")
    row(tmp_path, "other", {"a": [0.1]}, gold="letters")
    assert over(tmp_path, "one", "other") == ({}, "no judge scored both")
    (other / "samples.jsonl").unlink()
    assert over(tmp_path, "one", "other") == ({}, "one of them has no samples.jsonl")
    # PM scores compare under the same PM.
    for folder, score in ((one, 2.0), (other, 0.5)):
        line = {"prompt_id": "a", "prompt": "a?", "completion": "x", "pm_score": score}
        write(folder / "samples.jsonl", line)
        change(folder / "metrics.json", gold=None, preference_model_id="aaaa")
    assert over(tmp_path, "one", "other")[0] == {"pm_gain": 1.5}
    change(other / "metrics.json", preference_model_id="bbbb")
    assert over(tmp_path, "one", "other") == ({}, "no judge scored both")
    # Of two that are not known nobody can say that they are one.
    for folder in (one, other):
        change(folder / "metrics.json", preference_model_id=None)
    assert over(tmp_path, "one", "other") == ({}, "no judge scored both")


def test_a_row_is_compared_with_its_own_run(tmp_path: Path) -> None:
    for job, base in (("x", 0.1), ("y", 0.2)):
        row(tmp_path / job, "base", {"a": [base], "b": [base]}, seed=1)
        row(tmp_path / job, "ppo", {"a": [0.5], "b": [0.5]}, seed=1)
    found = collect([tmp_path])
    gains = [found.over(e, "base").figures["gold_gain"].value for e in found.group("ppo")]
    assert gains == pytest.approx([0.4, 0.3])
    row(tmp_path, "alone", {"a": [0.5]}, seed=1)
    assert over(tmp_path, "alone", "base") == ({}, "it has several rows of that seed")
    # Another seed has no partner, unless there is only one.
    row(tmp_path, "alone", {"a": [0.5]}, seed=2)
    assert over(tmp_path, "alone", "base") == ({}, "it has no row of that seed")
    shutil.rmtree(tmp_path / "y")
    assert over(tmp_path, "alone", "base")[0] == {"gold_gain": 0.4, "win_rate": 1.0}


def test_leaks_and_declared_feedback_are_said(run: Path) -> None:
    for seed in (1, 2):
        file = run / f"seed={seed}" / "arms" / "dpo" / "evaluation" / "metrics.json"
        change(file, feedback="human", feedback_declared=True, leaked_rows=7, leaked_prompts=3, dropped_leaked=0)
        file = run / f"seed={seed}" / "arms" / "rlaif_ppo" / "evaluation" / "metrics.json"
        change(file, feedback_declared=False, leaked_rows=0, leaked_prompts=0, dropped_leaked=5)
    for text in report(run):
        assert "dpo (feedback: human (declared by the user)): gold score gain over base" in text
        leak = "dpo: 7 rows of its training data resemble 3 evaluation prompts, so its figures flatter."
        assert text.count(leak) == 1
        assert "rlaif_ppo: 5 rows that resemble evaluation prompts were left out of its training." in text
        assert "rlaif_ppo (feedback: AI): gold" in text


def test_one_seed(tmp_path: Path) -> None:
    _, markdown = report(build(tmp_path / "run", seeds=(1,)))
    assert "gold score gain over base 0.41 [0.36, 0.46] (n=128): better." in markdown
    assert "mean of" not in markdown
    assert "not what another seed would change" in markdown


def test_sections_stand_in_order(run: Path) -> None:
    html, markdown = report(run)
    heads = re.findall(r"<h2>(.*?)</h2>", html)
    assert heads == [
        "Comparison",
        "Estimates",
        "KL against gold score",
        "Training curves: PPO",
        "Training curves: DPO",
        "Training curves: PM",
        "Label quality",
        "Preference models",
        "Sample completions",
        "Wall time by stage",
        "Provenance",
    ]
    assert re.findall(r"(?m)^## (.*)$", markdown) == [h for h in heads if h[:2] not in ("Es", "KL", "Tr")]
    assert html.count('<svg role="img"') == 3 + 1 + 12 + 1 + 1 + 4 + 2 + 1 + 2
    for text in (html, markdown):
        assert "abc123def456" in text
        assert "tie: 60, duplicate: 30" in text
        # Eight evaluations of 12.5 s and two labelings of 70 s.
        assert "1:40" in text
        assert "2:20" in text


@pytest.mark.parametrize(("agreement", "warned"), [(0.5, True), (0.4, True), (0.52, True), (0.71, False)])
def test_labels_no_better_than_chance_are_called_out(tmp_path: Path, agreement: float, warned: bool) -> None:
    html, markdown = report(build(tmp_path / "run", agreement=agreement))
    words = "This labeler agrees with the gold judge no better than chance"
    assert ('class="alarm"' in html) == (words in html) == (words in markdown) == warned
    assert ("point the wrong way" in html) == (agreement == 0.4)


def test_a_labeler_that_failed_its_audit_is_called_out(run: Path) -> None:
    assert "DO NOT TRAIN" not in report(run)[1]
    said = "DO NOT TRAIN ON THESE LABELS: as good as a coin."
    figures = {
        "audit_agreement": 0.5,
        "audit_agreement_n": 40,
        "audit_agreement_low": 0.35,
        "audit_agreement_high": 0.65,
    }
    change(run / "seed=1" / "labels" / "quality.json", audit_verdict=said, audit_trainable=False, **figures)
    html, markdown = report(run)
    assert 'class="alarm"' in html
    for text in (html, markdown):
        assert said in text
        assert "1 labels folder comes from a labeler whose audit says DO NOT TRAIN" in text
        assert "0.50 [0.35, 0.65] (n=40)" in text


def test_examples_are_drawn_from_the_prompts_that_all_rows_answered(run: Path) -> None:
    for seed in (1, 2):
        write(run / f"seed={seed}" / "arms" / "dpo" / "evaluation" / "samples.jsonl", samples("dpo", 20))
    rows, drawn = examples(collect([run]), "base", 10, 7)
    common = sorted(f"p{index}" for index in range(20))
    assert [example.prompt_id for example in drawn] == random.Random(7).sample(common, 10)
    assert [row.name for row in rows] == ["base", "dpo", "rlaif_ppo", "rlhf_ppo"]
    assert [row.seed for row in rows] == [1, 1, 1, 1]
    html, markdown = report(run, seed=7)
    for text in (html, markdown):
        assert "10 prompts, drawn at random (seed 7)" in text
        assert "not chosen by hand" in text
    assert "Sample completions" not in report(run, examples=0)[0]


def test_failed_jobs_are_listed(run: Path) -> None:
    write(run / "seed=3" / "failed.json", {"error": "out of memory", "overrides": ["seed=3", "method=ppo"]})
    for text in report(run):
        assert "1 job failed" in text
        assert "seed=3 method=ppo" in text
        assert "out of memory" in text


def test_hidden_folders_and_checkpoints_are_skipped(run: Path) -> None:
    arm = run / "seed=1" / "arms"
    shutil.copytree(arm / "dpo", arm / ".dpo.partial")
    shutil.copytree(arm / "dpo", arm / "rlaif_ppo" / "checkpoints" / "10")
    assert len(collect([run]).evaluations) == 8


def test_folders_below_two_roots_count_once(run: Path) -> None:
    assert len(collect([run, run / "seed=1", run.parent]).evaluations) == 8


def test_missing_keys_are_tolerated(tmp_path: Path) -> None:
    root = tmp_path / "run"
    write(root / "a" / "metrics.json", {"length": 12.5, "win_rate": None, "gold_score": float("nan")})
    write(root / "b" / "metrics.json", {"name": "b", "win_rate": 0.6, "seed": "first"})
    write(root / "b" / "quality.json", {"n_pairs": 5})
    write(root / "b" / "pm_metrics.json", {})
    write(root / "b" / "training.jsonl", {"loss": 0.5})
    write(root / "b" / "provenance.json", {"stage": "evaluate"})
    html, markdown = report(root)
    for text in (html, markdown):
        assert "b: win rate against the policy it started from 0.60 [no interval] (n not recorded): no verdict" in text
        assert "No row is named base" in text
        assert "a: no comparison with base was recorded" in text


def test_broken_files_are_named_not_fatal(run: Path) -> None:
    (run / "seed=1" / "labels" / "quality.json").write_text("{", encoding="utf-8")
    with (run / "seed=1" / "arms" / "dpo" / "training.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 1, "lo')
    html, _ = report(run)
    assert re.search(r"Left out: .*quality\.json: not valid JSON", html)
    assert re.search(r"Left out: .*training\.jsonl, line 41", html)
    assert len([curve for curve in collect([run]).curves if curve.kind == "dpo"]) == 2


def test_curves_belong_to_the_closest_row(run: Path) -> None:
    write(run / "seed=1" / "arms" / "rlaif_ppo" / "pm" / "training.jsonl", [{"step": 1, "loss": 0.7}])
    curves = {(curve.kind, curve.name, curve.seed) for curve in collect([run]).curves}
    assert ("ppo", "rlaif_ppo", 2) in curves
    assert ("dpo", "dpo", 1) in curves
    assert ("pm", "rlaif_ppo", 1) in curves
    assert ("pm", "seed=1/preference_model", None) in curves


def test_curves_on_validation_prompts_are_drawn_where_they_were_measured(run: Path) -> None:
    found = collect([run])
    for key in ("validation_score", "validation_kl", "validation_objective"):
        points = [curve.points(key) for curve in found.curves if curve.kind == "ppo"]
        assert [[x for x, _ in each] for each in points] == [[9, 19, 29, 39, 49, 59]] * 4
    group = next(group for group in plot_groups(found, "base") if group.title == "Training curves: PPO")
    captions = [figure.caption for figure in group.figures]
    assert captions[:6] == ["score", "kl", "reward", "validation score", "validation kl", "validation objective"]


def test_different_gold_judges_are_called_out(run: Path) -> None:
    change(run / "seed=1" / "arms" / "dpo" / "evaluation" / "metrics.json", gold="other")
    assert "Rows measured by different gold judges cannot be compared: other, sentiment" in report(run)[0]


def test_no_evaluation_is_the_users_error(tmp_path: Path) -> None:
    write(tmp_path / "run" / "metrics.json", {"accuracy": 1.0})
    with pytest.raises(UserError, match=r"no metrics\.json with gold_score, win_rate or length"):
        report(tmp_path / "run")
    with pytest.raises(UserError, match="no such folder"):
        report(tmp_path / "nowhere")
    assert not (tmp_path / "report").exists()


def test_only_the_baseline(tmp_path: Path) -> None:
    write(tmp_path / "run" / "evaluation" / "metrics.json", metrics("base", 1))
    assert "there is nothing to compare it with" in report(tmp_path / "run")[1]


def with_pms(folder: Path, names: dict[int, str]) -> None:
    """Give every row a PM score, by the PM of its seed."""
    for file in folder.rglob("metrics.json"):
        values = json.loads(file.read_text())
        values |= {"pm_score": 1.0, "pm_score_n": 128, "pm_score_low": 0.9, "pm_score_high": 1.1}
        values |= {
            "preference_model": f"labels ({names[values['seed']]})",
            "preference_model_id": names[values["seed"]],
        }
        file.write_text(json.dumps(values))


def test_scores_of_different_pms_have_no_mean(run: Path) -> None:
    with_pms(run, {1: "aaaa", 2: "bbbb"})
    table = comparison(collect([run]), "base")
    place, judge = table.columns.index("PM score"), table.columns.index("PM")
    assert {row.cells[place] for row in table.rows if row.summary} == {"2 PMs"}
    assert {row.cells[judge] for row in table.rows if not row.summary} == {"labels (aaaa)", "labels (bbbb)"}
    gold = table.columns.index("gold score")
    assert all("PMs" not in row.cells[gold] for row in table.rows if row.summary)
    with_pms(run, {1: "aaaa", 2: "aaaa"})
    table = comparison(collect([run]), "base")
    assert all(row.cells[place].startswith("1.0") for row in table.rows if row.summary)


def test_rows_of_a_seed_under_different_pms_are_called_out(run: Path) -> None:
    with_pms(run, {1: "aaaa", 2: "bbbb"})
    file = next(file for file in run.rglob("metrics.json") if json.loads(file.read_text())["seed"] == 1)
    file.write_text(file.read_text().replace("aaaa", "cccc"))
    text = "\n".join("".join(line) for line in warnings(collect([run]), "base"))
    assert "Seed 1: rows were scored by different PMs" in text
    assert "Seed 2" not in text


def test_a_pm_that_is_no_better_than_a_coin_is_named_with_what_it_guided(run: Path) -> None:
    _, before = report(run)
    assert "above chance" not in before
    pm = run / "seed=1" / "preference_model" / "pm_metrics.json"
    change(pm, accuracy=0.51, accuracy_low=0.42, accuracy_high=0.6)
    row = run / "seed=1" / "arms" / "rlaif_ppo" / "evaluation" / "metrics.json"
    change(row, guide_gate="failed", guide_accuracy=0.51, guide_accuracy_n=35)
    change(run / "seed=2" / "arms" / "rlaif_ppo" / "evaluation" / "metrics.json", guide_gate="unknown")
    html, markdown = report(run)
    for text in (html, markdown.replace("\\", "")):
        assert "1 preference model is not shown to be above chance: see Preference models." in text
        assert "Accuracy 0.51 [0.42, 0.60] (n=200). What it guides is guided by noise." in text
        assert "rlaif_ppo, seed 1, was guided by a preference model that did not pass its gate" in text
        assert "rlaif_ppo, seed 2, was guided by a preference model of which no held-out accuracy is known" in text


def test_a_pm_that_only_counts_words_is_noted(run: Path) -> None:
    pm = run / "seed=1" / "preference_model" / "pm_metrics.json"
    change(pm, gain_over_longer=0.01, gain_over_longer_n=200, gain_over_longer_low=-0.03, gain_over_longer_high=0.05)
    assert "is not shown to beat always preferring the longer completion" in report(run)[1]
    change(pm, gain_over_longer_low=0.005)
    assert "is not shown to beat" not in report(run)[1]
