"""Sweeps: ``-m`` anywhere, one folder a job, one report over all of them, and failed jobs that stop no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each test runs several commands

TINY_SETTINGS = [
    "model@policy=tiny",
    "data.max_prompts=60",
    "eval.gold=letters",
    "eval.max_new_tokens=8",
    "eval.max_prompts=6",
    "pm.max_steps=2",
    "pm.batch_size=4",
    # A random model after two steps knows nothing.
    "pm.gate=warn",
    "dpo.max_steps=2",
    "dpo.batch_size=4",
    "sft.max_steps=2",
    "sft.batch_size=4",
    "ppo.iterations=1",
    "ppo.rollouts=4",
    "ppo.minibatch_size=4",
    "ppo.max_new_tokens=8",
]
PROMPTS = Path(__file__).parents[2] / "data" / "everyday_prompts.jsonl"


@pytest.fixture(scope="module")
def sweep(smoke, run_command, tmp_path_factory):
    """Two methods, two kinds of feedback and two seeds, with ``-m`` in the middle; run in a folder of its own."""
    here = tmp_path_factory.mktemp("sweep")
    result = run_command(
        "train",
        "method=ppo,dpo",
        "feedback=ai,simulated_human",
        "-m",
        "seed=1,2",
        f"preferences={smoke}/labels",
        f"prompts={PROMPTS}",
        *TINY_SETTINGS,
        f"output_dir={here}/out",
        cwd=here,
    )
    return here, result


def test_one_complete_folder_for_each_job(sweep):
    here, _ = sweep
    assert [path.name for path in here.iterdir()] == ["out"], "the current folder stays clean"
    jobs = {
        f"feedback={feedback},method={method},seed={seed}": (method, feedback, seed)
        for method in ("ppo", "dpo")
        for feedback in ("ai", "simulated_human")
        for seed in (1, 2)
    }
    assert {path.name for path in (here / "out").iterdir()} == set(jobs)
    keys = set()
    for name, (method, feedback, seed) in jobs.items():
        folder = here / "out" / name
        metrics = json.loads((folder / "evaluation" / "metrics.json").read_text(encoding="utf-8"))
        assert (metrics["method"], metrics["feedback"], metrics["seed"]) == (method, feedback, seed)
        # pm_* needs a PM, which only PPO trains; everything else is comparable.
        keys.add(frozenset(key for key in metrics if not key.startswith(("pm", "preference_model"))))
        assert (folder / method / "policy" / "adapter_model.safetensors").is_file()
        assert (folder / "pm" / "preference_model").is_dir() == (method == "ppo")
        provenance = json.loads((folder / method / "provenance.json").read_text(encoding="utf-8"))
        assert provenance["seed"] == seed
    assert len(keys) == 1


def test_jobs_share_the_test_prompts_but_not_their_randomness(sweep):
    here, _ = sweep
    samples = {
        folder.name: [json.loads(line) for line in (folder / "evaluation" / "samples.jsonl").open(encoding="utf-8")]
        for folder in (here / "out").iterdir()
    }
    assert len({tuple(line["prompt_id"] for line in lines) for lines in samples.values()}) == 1
    assert len({json.dumps([line["completion"] for line in lines]) for lines in samples.values()}) > 4


def test_a_job_of_a_sweep_is_the_same_as_alone(sweep, smoke, run_command, tmp_path):
    """Jobs share a process; what came before must not show in the weights."""
    here, _ = sweep
    run_command(
        "train",
        "method=dpo",
        "feedback=simulated_human",
        "seed=2",
        f"preferences={smoke}/labels",
        f"prompts={PROMPTS}",
        *TINY_SETTINGS,
        f"output_dir={tmp_path}/alone",
        env={},
    )
    alone = (tmp_path / "alone" / "dpo" / "policy" / "adapter_model.safetensors").read_bytes()
    job = here / "out" / "feedback=simulated_human,method=dpo,seed=2"
    assert (job / "dpo" / "policy" / "adapter_model.safetensors").read_bytes() == alone


def test_one_report_over_the_sweep(sweep, run_command):
    here, _ = sweep
    result = run_command("report", f"output_dir={here}/out")
    assert "report.html" in result.stderr
    text = (here / "out" / "report.md").read_text(encoding="utf-8")
    for name in ("ppo_ai", "dpo_ai", "ppo_simulated_human", "dpo_simulated_human"):
        assert name in text


@pytest.mark.parametrize("place", [0, 2, 99])
def test_m_anywhere(place, inputs, run_command, tmp_path):
    arguments = [
        f"candidates={inputs}/candidates.jsonl",
        "constitution=warm",
        "labeler=scripted",
        "labeling.selection=all_pairs,best_worst",
        f"output_dir={tmp_path}/out",
    ]
    arguments.insert(place, "-m")
    run_command("label", *arguments, cwd=tmp_path)
    names = ["labeling.selection=all_pairs", "labeling.selection=best_worst"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    counts = [json.loads((tmp_path / "out" / name / "quality.json").read_text())["n_preferences"] for name in names]
    assert counts[0] > counts[1] > 0


def test_a_failed_job_keeps_its_row_and_is_mended_by_a_rerun(smoke, run_command, tmp_path):
    labels = tmp_path / "labels"
    labels.symlink_to(smoke / "labels")
    arguments = [
        "train",
        "method=sft",
        "feedback=ai,human",
        f"preferences={labels}",
        "eval.enabled=false",
        *TINY_SETTINGS,
        f"output_dir={tmp_path}/out",
        "-m",
    ]
    result = run_command(*arguments, expect=1)
    assert "Traceback" not in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith("error: 1 job(s) of the sweep failed: feedback=human")
    failed = json.loads((tmp_path / "out" / "feedback=human" / "failed.json").read_text(encoding="utf-8"))
    assert "feedback=human" in failed["error"]
    assert (tmp_path / "out" / "feedback=ai" / "sft" / "policy" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "feedback=ai" / "failed.json").exists()

    labels.unlink()
    labels.mkdir()
    (labels / "ai").symlink_to(smoke / "labels" / "ai")
    (labels / "human").symlink_to(smoke / "labels" / "simulated_human")
    result = run_command(*arguments)
    assert "sft: up to date, skipped" in result.stderr
    assert not (tmp_path / "out" / "feedback=human" / "failed.json").exists()
