"""PPO in two processes makes the numbers of one up to rounding, and after a kill its own to the last bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preloaded import Preloaded
from safetensors.torch import load_file

from tests.methods.test_ppo_resume import lines

# Everything that is taken over the whole batch is on: whitening, score statistics, baselines, adaptive KL, stop_kl.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from rlaif import sharding
from rlaif.config import Keep, KLControl, LoraSettings, ModelConfig, PPOConfig, Tuning
from rlaif.methods.ppo import PPOTrainer
from rlaif.models import seed_everything
from rlaif.policy import load_policy
from rlaif.processes import rank, spread, wait_for_all, world_size
from rlaif.records import Prompt

torch.set_num_threads(1)
folder, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
kill_after, nan_after = changes.pop("kill_after", 0), changes.pop("nan_after", 0)
prompts = [Prompt(f"p{i}", ({"role": "user", "content": "ab" * (i + 1)},)) for i in range(15)]
# Three of them: the processes' shares differ.
validation = [Prompt(f"v{i}", ({"role": "user", "content": "xy" * (i + 1)},)) for i in range(3)]
rounds = 0


def own(examples):
    # No two texts score the same: equal scores have no deviation, and what is whitened then is rounding.
    bad = nan_after and rounds > nan_after and rank() == 1
    return [float("nan") if bad else sum(ord(letter) % 7 for letter in each.completion) / 8 for each in examples]


def score(examples):
    global rounds
    rounds += examples[0].prompt[0]["content"][0] == "a"
    if rounds == kill_after and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return spread(own, examples)


if changes.pop("zero", False):
    # As under accelerate's launcher, which needs DeepSpeed for it.
    sharding.shares_optimizer = lambda: world_size() > 1
lora = LoraSettings(r=4, alpha=8, top_layers=changes.pop("top_layers", 1.0))
config = PPOConfig(
    tuning=Tuning(changes.pop("tuning", "lora")), lora=lora, rollouts=8, minibatch_size=4, max_new_tokens=6,
    max_prompt_length=43, kl_control=KLControl.adaptive, kl_horizon=100, kl_target=1.0, relative_reward=True,
    whiten_rewards=True, eval_every=2, keep=Keep.best, save_every=4, log_samples=2, entropy_coef=0.01,
    **{"iterations": 6, "micro_batch_size": 2, "learning_rate": 1e-3, **changes},
)
folder.mkdir(parents=True, exist_ok=True)
# Another start in each process, which only the main one's counts of.
seed_everything(rank())
policy = load_policy(ModelConfig(name="tiny", device="cpu"), config.tuning, config.lora)
trainer = PPOTrainer(config, policy, prompts, score, folder, 5, validation)
trainer.train()
wait_for_all()
save_file(trainer.weights(), folder / f"weights-{rank()}.safetensors")
"""


@pytest.fixture
def start(preloaded: Preloaded) -> Callable[..., str]:
    """Runs the script in so many processes; returns what they say."""

    def start(folder: Path, processes: int, expect: int = 0, **changes: Any) -> str:
        script = folder.with_suffix(".py")
        script.write_text(SCRIPT, encoding="utf-8")
        # As torchrun names them.
        group = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
        given = [str(folder), json.dumps(changes)]
        ended = preloaded.run_group(str(script), given, [group | rank for rank in ranks])
        said = "".join(process.stderr for process in ended)
        assert [process.returncode == 0 for process in ended] == [expect == 0] * processes, said[-4000:]
        return said

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"stop_kl": 0.004},
        {"top_layers": 0.5, "gradient_checkpointing": True},
        {"tuning": "full", "value_backprop": True},
        {"value_adapter": True, "top_layers": 0.5},
        {"zero": True, "stop_kl": 0.004, "tuning": "full", "warmup_iterations": 1},
    ],
    ids=["lora", "trunk", "full", "value-adapter", "zero"],
)
def test_two_processes_are_one(tmp_path: Path, start: Callable[..., str], changes: dict[str, Any]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Micro-batches belong to a process: of another size, they show that the gradient does not depend on them either.
    start(one, 1, **changes, micro_batch_size=4)
    start(two, 2, **changes)
    expected, *found = (
        load_file(folder / f"weights-{rank}.safetensors") for folder, rank in ((one, 0), (two, 0), (two, 1))
    )
    for name, value in expected.items():
        assert torch.equal(found[0][name], found[1][name]), name
        torch.testing.assert_close(found[0][name], value, atol=2e-5, rtol=1e-4)
    left, right = lines(one / "training.jsonl"), lines(two / "training.jsonl")
    assert len(left) == len(right) == 6
    for before, after in zip(left, right, strict=True):
        assert before.keys() == after.keys()
        for key in before.keys() - {"method"}:
            assert after[key] == pytest.approx(before[key], rel=1e-3, abs=1e-4), (key, before["iteration"])
    samples = [[row["completion"] for row in lines(folder / "samples.jsonl")] for folder in (one, two)]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 12
    assert left[0]["score"] != left[-1]["score"]
    if "stop_kl" in changes:
        assert {row["updates"] for row in right} - {4.0}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [False, True])
def test_two_processes_go_on_after_a_kill_to_the_same_bits(
    tmp_path: Path, start: Callable[..., str], zero: bool
) -> None:
    whole, cut, alone = tmp_path / "whole", tmp_path / "cut", tmp_path / "alone"
    start(whole, 2, zero=zero)
    start(cut, 2, expect=1, kill_after=6, zero=zero)
    assert [path.name for path in (cut / "checkpoints").glob("iteration-*")] == ["iteration-000004"]
    assert not list(cut.glob("weights-*"))
    shutil.copytree(cut, alone)
    start(cut, 2, zero=zero)
    for rank in (0, 1):
        left, right = (load_file(folder / f"weights-{rank}.safetensors") for folder in (whole, cut))
        assert all(torch.equal(value, right[name]) for name, value in left.items())
    for name in ("training.jsonl", "samples.jsonl"):
        assert lines(whole / name) == lines(cut / name)
    # One process may finish what two began.
    start(alone, 1)
    expected, found = (load_file(folder / "weights-0.safetensors") for folder in (whole, alone))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_stops_all(tmp_path: Path, start: Callable[..., str]) -> None:
    text = start(tmp_path / "out", 2, expect=1, nan_after=2)
    assert text.count("UserError: ppo: iteration 2 gave score") == 2
    assert len(lines(tmp_path / "out" / "training.jsonl")) == 2
