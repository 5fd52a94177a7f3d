"""PM and DPO training that was killed and started again makes the weights of a run that was not, to the last bit."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import Preloaded, run_script
from safetensors.torch import load_file

from rlaif.config import LoraSettings, ModelConfig, PMConfig, Tuning
from rlaif.methods import pm
from rlaif.methods.pm import train_pm
from rlaif.methods.supervised import newest_checkpoint
from rlaif.progress import keep_lines
from rlaif.records import Preference

# 40 steps of 16 prompts in batches of 4: ten times around, so that the order of the data is part of the state.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from rlaif.config import DPOConfig, LoraSettings, ModelConfig, PMConfig, Tuning
from rlaif.methods import supervised
from rlaif.methods.dpo import train_dpo
from rlaif.methods.pm import train_pm
from rlaif.records import Preference

torch.set_num_threads(1)
folder, method, tuning, kill_after = Path(sys.argv[1]), sys.argv[2], Tuning(sys.argv[3]), int(sys.argv[4])
step_end = supervised.Curve.on_step_end


def dies(self, args, state, control, **kwargs):
    if state.global_step == kill_after:
        os.kill(os.getpid(), signal.SIGKILL)
    step_end(self, args, state, control, **kwargs)


supervised.Curve.on_step_end = dies
train = [
    Preference(
        f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},), "a" * (3 + i % 4), "z" * (3 + i % 3), "0", "1", 0.9,
        "test", "ai",
    )
    for i in range(16)
]
start = ModelConfig(name="tiny", device="cpu")
settings = dict(
    tuning=tuning, lora=LoraSettings(r=4, alpha=8), max_steps=40, batch_size=4, learning_rate=1e-3, warmup_ratio=0.2
)
folder.mkdir(parents=True, exist_ok=True)
if method == "pm":
    train_pm(PMConfig(**settings), start, train, [], folder, 5)
else:
    train_dpo(DPOConfig(**settings), start, train, folder, 5)
"""


def test_a_checkpoint_that_was_cut_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whichever of its files is cut or missing, and if nothing says that it was written to its end."""
    train = [
        Preference(f"p{i}", ({"role": "user", "content": "ab"},), "a" * (3 + i), "z", "0", "1", 0.9, "test", "ai")
        for i in range(4)
    ]
    settings = PMConfig(lora=LoraSettings(r=2), max_steps=6, batch_size=2, learning_rate=1e-3)

    def fit(folder: Path) -> list[float]:
        train_pm(settings, ModelConfig(name="tiny", device="cpu"), train, [], folder, 5)
        return [line["loss"] for line in curve(folder)]

    whole = fit(tmp_path / "whole")
    cut = tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pm, "save_result", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(cut)
    kept = tmp_path / "kept"
    shutil.copytree(cut, kept)
    older, newest = (cut / "checkpoints" / f"checkpoint-{step}" for step in (5, 6))
    assert newest_checkpoint(cut / "checkpoints") == newest
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "complete.json"):
        file = newest / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        assert newest_checkpoint(cut / "checkpoints") == older
        file.unlink()
        assert newest_checkpoint(cut / "checkpoints") == older
        file.write_bytes(content)
    (newest / "trainer_state.json").write_text('{"global_step": 6, ')
    assert fit(cut) == whole
    assert "checkpoint-6 is not complete" in caplog.text
    for folder in (kept / "checkpoints").glob("checkpoint-*"):
        (folder / "complete.json").unlink()
    assert newest_checkpoint(kept / "checkpoints") is None


def test_a_curve_is_whole_before_or_after_it_is_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "training.jsonl"
    lines = ['{"step": 1}\n', '{"step": 2}\n', '{"step": 2}\n', '{"step": 3']
    file.write_text("".join(lines))
    keep_lines(file, "step", 3)
    assert file.read_text() == "".join(lines[:3])
    monkeypatch.setattr("rlaif.records.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep_lines(file, "step", 1)
    assert file.read_text() == "".join(lines[:3])
    monkeypatch.undo()
    keep_lines(file, "step", 1)
    assert file.read_text() == lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["training.jsonl"]


def start(preloaded: Preloaded | None, folder: Path, method: str, tuning: Tuning, kill_after: int = 0) -> int:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    result = run_script(preloaded, script, [str(folder), method, tuning.value, str(kill_after)])
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode


def curve(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
@pytest.mark.parametrize(("method", "result"), [("pm", "preference_model"), ("dpo", "policy")])
def test_40_steps_are_20_then_a_kill_then_the_rest(
    tmp_path: Path, preloaded: Preloaded, method: str, result: str, tuning: Tuning
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(None, whole, method, tuning) == 0
    # Checkpoints are written every eighth step: four steps of work are lost.
    assert start(preloaded, cut, method, tuning, kill_after=20) == -signal.SIGKILL
    assert (cut / "checkpoints" / "checkpoint-16").is_dir()
    assert not (cut / result).exists()
    assert start(preloaded, cut, method, tuning) == 0

    left, right = (
        {path.name: load_file(path) for path in (root / result).glob("*.safetensors")} for root in (whole, cut)
    )
    assert left.keys() == right.keys()
    assert left
    for file, tensors in left.items():
        assert tensors.keys() == right[file].keys()
        assert max(float((tensors[name] - right[file][name]).abs().max()) for name in tensors) == 0
        assert any(bool(torch.any(value != 0)) for value in tensors.values())
    keep = {"step", "loss", "learning_rate", "grad_norm", "accuracy", "margin"}
    rows = [[{key: row[key] for key in keep & row.keys()} for row in curve(root)] for root in (whole, cut)]
    assert [row["step"] for row in rows[0]] == list(range(1, 41))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("stray", ["checkpoint-7 (copy)", "checkpoint-old"])
def test_a_stray_folder_is_no_checkpoint(tmp_path: Path, stray: str) -> None:
    (tmp_path / stray).mkdir()
    assert newest_checkpoint(tmp_path) is None
