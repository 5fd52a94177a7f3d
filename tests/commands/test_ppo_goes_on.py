"""A PPO run that was killed goes on from its checkpoint after a change of settings that change no number."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from preloaded import Preloaded, run_script

KILLED = """
import os, signal, sys
from rlaif.methods.ppo_checkpoint import Checkpoints

save = Checkpoints.save

def kill_after(self, progress, tensors):
    save(self, progress, tensors)
    if progress.iteration == 4:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = kill_after
sys.argv[0] = "rlaif.train"
from rlaif.cli import launch
from rlaif.train import USAGE, main
launch("train", main, USAGE)
"""

PPO = [
    *("method=ppo", "policy.name=tiny", "policy.device=cpu", "reward=labeler", "labeler=scripted", "constitution=warm"),
    *("ppo.iterations=6", "ppo.rollouts=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=4", "ppo.max_new_tokens=4"),
    *("ppo.save_every=2", "ppo.log_samples=2", "ppo.report_to=[]", "ppo.learning_rate=1e-2", "eval.enabled=false"),
]
SPEED = {
    "micro_batch_size": "2",
    "rollout_batch_size": "3",
    "save_every": "5",
    "log_samples": "4",
    "gradient_checkpointing": "true",
    "eval_every": "3",
    "report_to": "[tensorboard]",
}


@pytest.fixture(scope="module")
def killed(preloaded: Preloaded, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders of runs that were killed after their checkpoint of iteration 4, by ``ppo.linear_decay``."""
    root = tmp_path_factory.mktemp("killed")
    script = root / "script.py"
    script.write_text(KILLED, encoding="utf-8")
    found = {}
    for decay in (True, False):
        folder = root / str(decay)
        overrides = [*PPO, f"prompts={inputs}/prompts.jsonl", f"output_dir={folder}", f"ppo.linear_decay={decay}"]
        result = run_script(preloaded, script, overrides)
        assert result.returncode == -signal.SIGKILL, result.stderr[-4000:]
        assert (folder / ".ppo.partial" / "checkpoints" / "iteration-000004").is_dir()
        found[decay] = folder
    return found


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def go_on(run_command: Any, inputs: Path, source: Path, folder: Path, *changes: str) -> tuple[str, list[Any]]:
    """Give the command again in a copy, with changes; returns what it said and the curve before the kill."""
    shutil.copytree(source, folder)
    before = curve(folder / ".ppo.partial")
    overrides = [*PPO, f"prompts={inputs}/prompts.jsonl", f"output_dir={folder}", *changes]
    return run_command("train", *overrides).stderr, before


@pytest.mark.parametrize(
    "names", [[name] for name in SPEED if name == "micro_batch_size"] + [[n for n in SPEED if n != "micro_batch_size"]]
)
def test_after_a_change_of_memory_speed_and_logging(
    names: list[str], killed: dict[bool, Path], run_command: Any, inputs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    changes = [f"ppo.{name}={SPEED[name]}" for name in names]
    told, before = go_on(run_command, inputs, killed[True], folder, *changes)
    assert "ppo: going on from iteration 4" in told
    lines = curve(folder / "ppo")
    # With their seconds: these rounds were not made again.
    assert lines[:4] == before[:4]
    assert [line["iteration"] for line in lines] == list(range(6))
    samples = [json.loads(line)["iteration"] for line in (folder / "ppo" / "samples.jsonl").read_text().splitlines()]
    later = int(SPEED["log_samples"]) if "log_samples" in names else 2
    assert samples == [0, 0, 1, 1, 2, 2, 3, 3] + [4] * later + [5] * later
    assert not list(folder.glob(".ppo*"))
    # And what is finished is finished under any of them.
    provenance = (folder / "ppo" / "provenance.json").read_text()
    overrides = [*PPO, f"prompts={inputs}/prompts.jsonl", f"output_dir={folder}"]
    every = [f"ppo.{name}={value}" for name, value in SPEED.items()]
    assert "ppo: up to date, skipped" in run_command("train", *overrides, *every).stderr
    assert (folder / "ppo" / "provenance.json").read_text() == provenance
    recorded = json.loads(provenance)["config"]["ppo"]
    assert all(str(recorded[name]).lower() == SPEED[name].replace("[tensorboard]", "['tensorboard']") for name in names)


def test_more_rounds_without_a_decay(killed: dict[bool, Path], run_command: Any, inputs: Path, tmp_path: Path) -> None:
    told, before = go_on(
        run_command, inputs, killed[False], tmp_path / "more", "ppo.linear_decay=false", "ppo.iterations=8"
    )
    assert "ppo: going on from iteration 4" in told
    lines = curve(tmp_path / "more" / "ppo")
    assert len(lines) == 8
    assert lines[:4] == before[:4]
    # The same as a run that meant to go so far from the start.
    whole = tmp_path / "whole"
    overrides = [*PPO, f"prompts={inputs}/prompts.jsonl", f"output_dir={whole}"]
    run_command("train", *overrides, "ppo.linear_decay=false", "ppo.iterations=8")
    rows = [
        [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in curve(root / "ppo")]
        for root in (tmp_path / "more", whole)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("decay", "changes"),
    [
        (True, ["ppo.iterations=8"]),
        (False, ["ppo.linear_decay=false", "ppo.iterations=5"]),
        (True, ["ppo.eval_every=3", "ppo.keep=best"]),
    ],
)
def test_what_changes_numbers_starts_afresh_and_keeps_the_old_run(
    decay: bool, changes: list[str], killed: dict[bool, Path], run_command: Any, inputs: Path, tmp_path: Path
) -> None:
    told, before = go_on(run_command, inputs, killed[decay], tmp_path / "run", *changes)
    assert "going on from iteration" not in told
    assert "is kept as" in told
    lines = curve(tmp_path / "run" / "ppo")
    assert lines[0] != before[0]
    (kept,) = (tmp_path / "run").glob("*/checkpoints/iteration-000004")
    assert curve(kept.parents[1]) == before
