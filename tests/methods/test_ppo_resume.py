"""PPO that was killed and started again makes the numbers of a run that was not, to the last bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import Preloaded, run_script
from safetensors.torch import load_file

from rlaif.config import Tuning

# Everything that has a state is on: schedule, adaptive KL, score statistics, baselines, prompts that are left out,
# the best policy so far.
SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from rlaif.config import Keep, KLControl, LoraSettings, ModelConfig, PPOConfig, Tuning
from rlaif.methods.ppo import train_ppo
from rlaif.records import Prompt

torch.set_num_threads(1)
folder, tuning, kill_after = Path(sys.argv[1]), Tuning(sys.argv[2]), int(sys.argv[3])
prompts = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},)) for i in range(15)]
validation = [Prompt(f"v{i}", ({"role": "user", "content": "xy" * (i + 1)},)) for i in range(4)]
rounds = 0


def score(examples):
    global rounds
    if examples[0].prompt[0]["content"][0] == "a":
        rounds += 1
        if rounds == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
    return [sum(letter in "aeiou" for letter in example.completion) / 4 for example in examples]


config = PPOConfig(
    tuning=tuning, lora=LoraSettings(r=4, alpha=8), iterations=40, rollouts=8, minibatch_size=4, micro_batch_size=2,
    max_new_tokens=6, max_prompt_length=43, learning_rate=1e-2, kl_control=KLControl.adaptive, kl_horizon=100,
    kl_target=1.0, relative_reward=True, eval_every=3, keep=Keep.best, save_every=20, log_samples=2,
)
folder.mkdir(parents=True, exist_ok=True)
train_ppo(config, ModelConfig(name="tiny", device="cpu"), prompts, score, folder, 5, validation)
"""


def start(preloaded: Preloaded | None, folder: Path, tuning: Tuning, kill_after: int = 0) -> int:
    script = folder.with_suffix(".py")
    script.write_text(SCRIPT, encoding="utf-8")
    result = run_script(preloaded, script, [str(folder), tuning.value, str(kill_after)])
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode


def lines(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "policy").glob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_40_steps_are_20_then_a_kill_then_20(tmp_path: Path, preloaded: Preloaded, tuning: Tuning) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(None, whole, tuning) == 0
    # Three rounds of work after the checkpoint are lost; relative rewards score each round's baselines too.
    assert start(preloaded, cut, tuning, kill_after=24) == -signal.SIGKILL
    assert [path.name for path in sorted((cut / "checkpoints").glob("iteration-*"))] == ["iteration-000020"]
    assert not (cut / "policy").exists()
    assert len(lines(cut / "training.jsonl")) > 20
    # Killed again at once, before there is anything new.
    assert start(preloaded, cut, tuning, kill_after=1) == -signal.SIGKILL
    assert start(preloaded, cut, tuning) == 0

    left, right = tensors(whole), tensors(cut)
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) == 0
    for name in ("training.jsonl", "samples.jsonl"):
        assert lines(whole / name) == lines(cut / name)
    assert len(lines(cut / "training.jsonl")) == 40
    assert len(lines(cut / "samples.jsonl")) == 80
