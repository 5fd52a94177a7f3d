"""scripts/demo_pms.py: PMs of both kinds of labels under several seeds, and what each is worth."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "demo_pms.py"


def test_seeds_are_numbers_and_ranges() -> None:
    assert runpy.run_path(str(SCRIPT))["seeds"]("1-3,7") == [1, 2, 3, 7]


@pytest.mark.slow
def test_every_pm_gets_a_line(command_env: dict[str, str], tmp_path: Path) -> None:
    quick = ["experiment=smoke", "pm.max_steps=2", "data.validation_fraction=0.3"]
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "1-2", *quick]
    made = subprocess.run(command, env=command_env, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = made.stdout.splitlines()
    rows = [tuple(line.split(" | "))[:2] for line in lines[2:6]]
    assert rows == [("| ai", "1"), ("| ai", "2"), ("| simulated_human", "1"), ("| simulated_human", "2")]
    assert [line.partition(":")[0] for line in lines[-2:]] == ["ai", "simulated_human"]
    # After two steps the PM of a random model is not above chance.
    assert made.returncode == 1
    votes = [
        json.loads((tmp_path / "out" / f"seed={seed}" / "labels" / "simulated_human" / "quality.json").read_text())
        for seed in (1, 2)
    ]
    assert votes[0]["agreement"] != votes[1]["agreement"]
    again = subprocess.run(command, env=command_env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.stdout == made.stdout
    # Candidates, and of either seed two kinds of labels and PMs.
    assert again.stderr.count("up to date, skipped") == 9
