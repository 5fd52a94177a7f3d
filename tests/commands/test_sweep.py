"""Sweeps: ``-m`` anywhere, one folder a job, one report over all of them, and failed jobs that stop no other.

Jobs run in this process or, by Hydra's launchers, in others: under joblib, and under submitit's local executor.
"""

from __future__ import annotations

import contextlib
import json
import string
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.cli import LOST, job_folder

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
        # pm_* and guide_* need a PM, which only PPO trains; everything else is comparable.
        keys.add(frozenset(key for key in metrics if not key.startswith(("pm", "guide", "preference_model"))))
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


def test_a_failed_job_keeps_its_row_and_is_mended_by_a_rerun(smoke, inputs, run_command, tmp_path):
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
    (labels / "human").symlink_to(inputs / "preferences")
    result = run_command(*arguments)
    assert "sft: up to date, skipped" in result.stderr
    assert not (tmp_path / "out" / "feedback=human" / "failed.json").exists()


LAUNCHERS = ["joblib", "submitit_local"]


def beside(inputs: Path, folder: Path) -> list[str]:
    """A cheap labeling."""
    return [f"candidates={inputs}/candidates.jsonl", "labeler=scripted", f"output_dir={folder}"]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_in_other_processes(launcher, inputs, run_command, tmp_path):
    """Every job has its folder, a failed one its line and its row, and nothing lies about."""
    copy = tmp_path / "my warm.yaml"
    copy.write_text((PROMPTS.parents[1] / "constitutions" / "warm.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    result = run_command(
        "label",
        *beside(inputs, tmp_path / "out"),
        f"constitution=warm,nice,'{copy}'",
        "-m",
        f"hydra/launcher={launcher}",
        env={},
        cwd=tmp_path,
        expect=1,
    )
    last = result.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: 1 job(s) of the sweep failed: constitution=nice: constitution=nice: no such")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my warm.yaml", "out"], "no litter beside the output"
    own = job_folder([f"constitution='{copy}'"])
    assert {path.name for path in visible(tmp_path / "out")} == {"constitution=warm", "constitution=nice", own}
    for name in ("constitution=warm", own):
        assert (tmp_path / "out" / name / "labels.jsonl").is_file()
    failed = json.loads((tmp_path / "out" / "constitution=nice" / "failed.json").read_text(encoding="utf-8"))
    assert "no such constitution" in failed["error"]
    assert "constitution=nice" in failed["overrides"]
    kept = [path for path in (tmp_path / "out").rglob("*") if ".sweep-" in str(path) and path.is_file()]
    assert {path.suffix for path in kept} <= {".err", ".out"}, "only what jobs printed elsewhere"


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_that_is_killed_has_failed(launcher, inputs, start_command, tmp_path):
    process = start_command(
        "label",
        *beside(inputs, tmp_path / "out"),
        "constitution=warm",
        "labeler.scripted.delay_s=0,600",
        "-m",
        f"hydra/launcher={launcher}",
        "hydra.launcher.n_jobs=2" if launcher == "joblib" else "hydra.launcher.timeout_min=5",
    )
    done, killed = (tmp_path / "out" / f"labeler.scripted.delay_s={delay}" for delay in (0, 600))
    until = time.monotonic() + 120
    while not ((done / "provenance.json").is_file() and (killed.parent / f".{killed.name}.partial").is_dir()):
        assert time.monotonic() < until, process.log.read_text(encoding="utf-8")
        time.sleep(0.2)
    for worker in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the job that is done may just end
            if {"submitit.core._submit", "joblib.externals.loky.backend.popen_loky_posix"} & set(worker.cmdline()):
                worker.kill()
    assert process.wait(120) == 1
    errors = process.log.read_text(encoding="utf-8")
    # loky's own process says more after it.
    assert f"\nerror: 1 job(s) of the sweep failed: {killed.name}: {LOST}\n" in errors
    assert "Traceback" not in errors
    assert json.loads((killed / "failed.json").read_text(encoding="utf-8"))["error"] == LOST
    assert not (done / "failed.json").exists()


def test_two_jobs_never_share_a_folder(inputs, run_command, tmp_path):
    """Values that differ in odd characters only; a value that is given twice is refused."""
    names = ["a b.yaml", "a_b.yaml", "a-b.yaml"]
    text = (PROMPTS.parents[1] / "constitutions" / "warm.yaml").read_text(encoding="utf-8")
    for number, name in enumerate(names):
        (tmp_path / name).write_text(text.replace("version: ", f"version: {number}"), encoding="utf-8")
    swept = ",".join(f"'{name}'" for name in names)
    run_command("label", *beside(inputs, tmp_path / "out"), f"constitution={swept}", "-m", cwd=tmp_path)
    labels = [folder / "labels.jsonl" for folder in (tmp_path / "out").iterdir()]
    assert len(labels) == 3
    assert all(file.is_file() for file in labels)
    result = run_command("label", *beside(inputs, tmp_path / "two"), "constitution=warm,warm", "-m", expect=2)
    assert "constitution=warm: two jobs of the sweep would write this folder" in result.stderr
    assert not (tmp_path / "two").exists()


PLAIN = st.text(string.ascii_letters + string.digits + ".@+-_", min_size=1, max_size=20)


@given(st.lists(st.tuples(st.sampled_from("abc"), PLAIN), min_size=1, max_size=3, unique_by=lambda part: part[0]))
def test_an_ordinary_value_names_its_folder(parts):
    words = [f"{key}={value}" for key, value in parts]
    assert job_folder(words) == ",".join(sorted(words))


@given(st.lists(st.text(max_size=300), min_size=2, max_size=5, unique=True))
def test_other_values_get_folders_of_their_own(values):
    folders = [job_folder([f"k={value}"]) for value in values]
    assert len(set(folders)) == len(values)
    for folder in folders:
        assert len(folder.encode()) < 256
        assert not {"/", "\0", "\n"} & set(folder)


SECRETS = ["sk-proj-SECRET123456", "PASSWORD99", "hunter2"]


def test_secrets_set_by_mistake_are_written_nowhere(inputs, run_command, tmp_path):
    """Not in failed.json, folders' names, messages, provenance or what a launcher leaves, nor in the report of it."""
    result = run_command(
        "label",
        *beside(inputs, tmp_path / "out"),
        "constitution=warm,helpful",
        f"labeler.api_key_env=OPENAI_API_KEY,{SECRETS[0]}",
        f"labeler.base_url='http://user:{SECRETS[1]}@host/v1'",
        f"labeler.extra_body={{api_key: {SECRETS[2]}, note: kept}}",
        "-m",
        expect=1,
    )
    folder = tmp_path / "out"
    shown = [str(path) for path in folder.rglob("*")] + [result.stdout, result.stderr]
    shown += [path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file()]
    assert not [secret for secret in SECRETS for text in shown if secret in text]
    (good, *_) = (json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("provenance.json"))
    assert good["config"]["labeler"]["extra_body"] == {"api_key": "[hidden]", "note": "kept"}
    failed = [json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("failed.json")]
    assert {override for job in failed for override in job["overrides"]} >= {
        "labeler.api_key_env=[hidden]",
        "labeler.base_url='http://[hidden]@host/v1'",
    }
