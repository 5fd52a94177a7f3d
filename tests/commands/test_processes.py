"""Two processes train what one process trains with the same batches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

REPO = Path(__file__).parents[2]
COMMON = ["policy.name=tiny", "policy.device=cpu", "feedback=human", "eval.enabled=false"]


def arguments(method: str, inputs: Path, output: Path, batch_size: int) -> list[str]:
    own = [f"{method}.batch_size={batch_size}", f"{method}.max_steps=4", f"{method}.learning_rate=1e-3"]
    own += [f"{method}.tuning=full"] if method == "sft" else [f"{method}.lora.r=4"]
    return [*COMMON, f"method={method}", f"preferences={inputs}/preferences", f"output_dir={output}", *own]


def launch(env: dict[str, str], *overrides: str, expect: int = 0) -> str:
    """With torchrun: on CPUs ``accelerate launch`` wants MPI for more than one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rlaif.train"]
    result = subprocess.run(
        [*command, *overrides], env=env, cwd=REPO, capture_output=True, text=True, timeout=300, check=False
    )
    assert (result.returncode == 0) == (expect == 0), result.stderr[-4000:]
    return result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "pm", "dpo"])
def test_two_processes_are_one_with_twice_the_batch(
    method: str, inputs: Path, command_env: dict[str, str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    run_command("train", *arguments(method, inputs, tmp_path / "one", 8))
    launch(command_env, *arguments(method, inputs, tmp_path / "two", 4))
    model = "pm/preference_model" if method == "pm" else f"{method}/policy"
    name = "model.safetensors" if method == "sft" else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / folder / model / name) for folder in ("one", "two"))
    assert set(one) == set(two)
    for key, value in one.items():
        # Adam turns gradients that are only rounding into steps of full size: single weights may differ.
        assert float((value - two[key]).norm()) <= 2e-3 * float(value.norm()), key
    provenance = json.loads((tmp_path / "two" / method / "provenance.json").read_text())
    assert provenance["config"]["processes"] == 2
    curves = [
        [json.loads(line) for line in (tmp_path / folder / method / "training.jsonl").read_text().splitlines()]
        for folder in ("one", "two")
    ]
    assert len(curves[0]) == len(curves[1]) == 4
    losses = [[line["loss"] for line in curve] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0]
    assert not list((tmp_path / "two").rglob(".*"))
    # Given again, it is up to date, and every process sees so.
    assert "up to date, skipped" in launch(command_env, *arguments(method, inputs, tmp_path / "two", 4))


@pytest.mark.slow
def test_an_error_ends_all_processes(inputs: Path, command_env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "out" / "dpo").mkdir(parents=True)
    (tmp_path / "out" / "dpo" / "mine.txt").write_text("mine")
    text = launch(command_env, *arguments("dpo", inputs, tmp_path / "out", 4), expect=2)
    assert "was not made by rlaif.dpo" in text
    text = launch(command_env, *COMMON, "method=best_of_n", f"output_dir={tmp_path / 'other'}", expect=2)
    assert "method=best_of_n runs in one process" in text
