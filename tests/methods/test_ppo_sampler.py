"""PPO's rollouts by vLLM: against an engine that is played by transformers, and against the real one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlaif.artifacts import deciding
from rlaif.config import (
    Dtype,
    LabelerConfig,
    LabelerType,
    LoraSettings,
    Method,
    ModelConfig,
    PPOConfig,
    Reward,
    Sampler,
    SamplerVLLMConfig,
    TrainConfig,
    Tuning,
    ValueInit,
)
from rlaif.engines.vllm_process import VLLMProcess
from rlaif.generation import generate
from rlaif.methods import stages
from rlaif.methods.ppo import PPOTrainer, train_ppo
from rlaif.methods.ppo_checks import StartCheckError, check_sampler_follows, check_start
from rlaif.methods.ppo_rollout import ScoreFunction
from rlaif.methods.ppo_sampler import VLLMSampler, check_sampler, one_seed, shaken
from rlaif.models import load_sequence_scorer, load_tokenizer, lora_config, seed_everything
from rlaif.policy import load_policy
from rlaif.records import Example, UserError
from tests.methods.problem import PROMPTS, TINY, VALIDATION, ppo_config, vowels


def config(**changes: Any) -> PPOConfig:
    played = SamplerVLLMConfig(python=__file__)  # any file: the process is played
    return ppo_config(**{"sampler": Sampler.vllm, "vllm": played, "save_every": 1, **changes})


class Played:
    """Answers the jobs of rlaif/engines/vllm_worker.py with a transformers model, in this process."""

    opened: ClassVar[list[Played]] = []
    deaf = False
    """Take adapters and do nothing with them."""
    stale = False
    """Go on with the first adapter."""
    offset = 0.0
    """Add to every log-probability."""
    temperature: float | None = None
    """Sample at this one, whatever is asked for."""
    dies_at: int | None = None
    """End with this batch of completions."""

    def __init__(self, arguments: dict[str, Any], python: str | None, where: str, kept: str) -> None:
        self.arguments, self.where, self.kept = arguments, where, kept
        self.jobs: list[dict[str, Any]] = []
        self.batches = 0
        self.closed = False
        self.model = self.base(arguments["model"])
        self.adapters: dict[int, Any] = {}
        Played.opened.append(self)

    def base(self, path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, self.arguments["dtype"])).eval()

    def ask(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        self.jobs += [dict(job) for job in jobs]
        if "sample" in jobs[0]:
            self.batches += 1
            if self.batches == Played.dies_at:
                raise UserError(f"{self.where}: vLLM ended early: no message ({self.kept})")
            return self.complete(jobs)
        return [self.take(job) for job in jobs]

    def take(self, job: dict[str, Any]) -> dict[str, Any]:
        if "weights" in job:
            assert Path(job["weights"]).is_dir()
            self.model = self.base(job["weights"])
            return {}
        assert job["adapter"] not in self.adapters
        first = next(iter(self.adapters.values()), None)
        base = self.base(self.arguments["model"])
        new = base if self.deaf else PeftModel.from_pretrained(base, job["load"]).eval()
        self.adapters = {job["adapter"]: first if self.stale and first is not None else new}
        return {}

    def complete(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        [adapter] = {job.get("adapter") for job in jobs}
        parameters = jobs[0]["sample"]
        assert parameters["ignore_eos"]
        generations = generate(
            self.model if adapter is None else self.adapters[adapter],
            [job["ids"] for job in jobs],
            [[job["sample"]["seed"], 1] for job in jobs],
            max_new_tokens=parameters["max_tokens"],
            temperature=self.temperature or parameters["temperature"],
            eos=parameters["stop_token_ids"],
            pad=256,
        )
        return [
            {
                "tokens": generation.tokens,
                "finish": generation.finish_reason,
                "logps": [logp + self.offset for logp in generation.logps],
            }
            for generation in generations
        ]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr("rlaif.methods.ppo_sampler.VLLMProcess", Played)
    monkeypatch.setattr(Played, "opened", [])
    return Played


def trainer(folder: Path, start: ModelConfig = TINY, score: ScoreFunction = vowels, **changes: Any) -> PPOTrainer:
    seed_everything(0)
    settings = config(**changes)
    policy = load_policy(start, settings.tuning, settings.lora)
    sampler = VLLMSampler(policy, settings, folder / "sampler")
    return PPOTrainer(settings, policy, PROMPTS, score, folder, 0, VALIDATION, sampler=sampler)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """A curve without its times."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_every_batch_is_sampled_with_the_policys_present_weights(
    tmp_path: Path, played: type[Played], tuning: Tuning
) -> None:
    ppo = trainer(tmp_path, tuning=tuning, temperature=0.7, iterations=3)
    check_sampler_follows(ppo)
    seen = []
    for iteration in range(3):
        line, rollouts = ppo.step(iteration)
        assert line["sampler_difference"] < 1e-5
        seen.append(line["kl"])
        after = ppo.actor.evaluate(rollouts.batch)[0]
        # The step moved the policy, so that only the new weights give figures like those of the next round.
        assert (after - rollouts.sampled).abs().max() > 1e-3
    assert seen[0] == pytest.approx(0, abs=1e-4)
    assert max(map(abs, seen[1:])) > 1e-2
    [process] = played.opened
    over = [job for job in process.jobs if "load" in job or "weights" in job]
    assert len(over) == 5
    if tuning is Tuning.lora:
        assert [job["adapter"] for job in over] == [1, 2, 3, 4, 5]
        newest = 0
        for job in process.jobs:
            newest = job["adapter"] if "load" in job else newest
            assert job["adapter"] == newest
    assert len({job.get("load") or job["weights"] for job in over}) == 5
    *past, newest_folder = [Path(job.get("load") or job["weights"]) for job in over]
    assert not any(folder.exists() for folder in past)
    assert newest_folder.exists() == (tuning is Tuning.lora)


def test_training_takes_its_own_log_probabilities_and_values(tmp_path: Path, played: type[Played]) -> None:
    ppo = trainer(tmp_path)
    torch.nn.init.normal_(ppo.value_head.linear.weight)
    Played.offset = 0.5
    try:
        line, rollouts = ppo.step(1)
    finally:
        Played.offset = 0.0
    mask = rollouts.batch.completion_mask.bool()
    assert line["sampler_difference"] == pytest.approx(0.5, abs=1e-4)
    torch.testing.assert_close(rollouts.logps[mask] + 0.5, rollouts.sampled[mask], atol=1e-4, rtol=0)
    assert line["kl"] == pytest.approx(0, abs=1e-4)
    assert bool(rollouts.values.any())


def test_a_completion_is_a_function_of_its_seed_and_ends_where_training_says(
    tmp_path: Path, played: type[Played]
) -> None:
    ppo = trainer(tmp_path, max_new_tokens=40)
    seeds = [(0, 1, 2, row, 1) for row in (0, 1, 0)]
    ids = [5, 6, 7]
    one, two, again = ppo.actor.sample([ids] * 3, seeds)
    assert one.tokens == again.tokens != two.tokens
    found = ppo.actor.sample([ids] * 30, [(s, 1, 1) for s in range(30)])
    assert {g.ended for g in found} == {True, False}
    for generation in found:
        assert generation.ended == (generation.tokens[-1] in ppo.actor.eos)
        assert generation.ended or len(generation.tokens) == 40
    [process] = played.opened
    job = process.jobs[-1]
    assert job["ids"] == ids
    assert job["sample"]["temperature"] == 1.0
    assert "top_p" not in job["sample"]


def test_seeds_are_63_bits_that_differ_by_every_word() -> None:
    words = [(s, 1, i, row, 1) for s in range(3) for i in range(10) for row in range(10)]
    seeds = [one_seed(each) for each in words]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert one_seed((0, 1, 2, 3, 1)) == one_seed([0, 1, 2, 3, 1])


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_shaken_weights_are_other_weights_and_come_back_to_the_last_bit(tmp_path: Path, tuning: Tuning) -> None:
    policy = load_policy(TINY, tuning, LoraSettings(r=4, alpha=8))
    before = {name: value.detach().clone() for name, value in policy.trainable()}
    ids = torch.arange(20).unsqueeze(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        plain = policy.model(ids).logits.log_softmax(-1)
        with shaken(policy, seed=0):
            assert (policy.model(ids).logits.log_softmax(-1) - plain).abs().mean() > 0.03
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in policy.trainable())


# Each fault is seen before the first update.


@pytest.mark.parametrize("fault", [{"deaf": True}, {"stale": True}, {"temperature": 0.7}, {"offset": 0.2}])
@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_a_sampler_that_is_not_the_policy_is_seen_at_the_start(
    tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any], dtype: Dtype
) -> None:
    ppo = trainer(tmp_path, dataclasses.replace(TINY, dtype=dtype))
    ppo.actor.sample([[1, 2, 3]], [(0, 1)])  # an earlier adapter, for what is stale to stay with
    check_sampler_follows(ppo)
    for name, value in fault.items():
        monkeypatch.setattr(Played, name, value)
    with pytest.raises(StartCheckError, match=r"ppo\.sampler=vllm: vLLM does not sample from the policy") as caught:
        ppo.train()
    assert "\n" not in str(caught.value)
    assert not lines_of(tmp_path / "training.jsonl")


def test_another_base_model_is_seen_at_the_start_and_where_a_run_goes_on(
    tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = trainer(tmp_path)
    other = Played.base

    def wrong(self: Played, path: str) -> Any:
        model = other(self, path)
        with torch.no_grad():
            for value in model.model.layers[0].parameters():
                value.mul_(0.9)
        return model

    ppo.step(0)
    ppo.progress.iteration = 1
    ppo.save_checkpoint()
    monkeypatch.setattr(Played, "base", wrong)
    for _ in range(2):
        with pytest.raises(StartCheckError, match="does not sample from the policy"):
            trainer(tmp_path).train()
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)


def test_the_first_rollout_is_compared_too(tmp_path: Path, played: type[Played]) -> None:
    ppo = trainer(tmp_path)
    rollouts = ppo.rollout(0)
    check_start(ppo, rollouts)
    rollouts.sampled += 0.2
    with pytest.raises(StartCheckError, match="the sampler's log-probabilities minus the policy's"):
        check_start(ppo, rollouts)


# Whole runs.


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_validation_and_baselines_are_sampled_by_vllm_too(
    tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch, tuning: Tuning
) -> None:
    own = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal own
        own += 1
        return generate(*args, **options)

    monkeypatch.setattr("rlaif.methods.ppo_rollout.generate", counted)
    train_ppo(config(eval_every=1, relative_reward=True, tuning=tuning), TINY, PROMPTS, vowels, tmp_path, 0, VALIDATION)
    # With all weights the reference is a frozen copy, which vLLM does not have.
    assert (own > 0) == (tuning is Tuning.full)
    [process] = played.opened
    assert process.closed
    assert not (tmp_path / "sampler").exists()
    plain = [job for job in process.jobs if "sample" in job and "adapter" not in job]
    # Every training and validation prompt once.
    assert len(plain) == len(PROMPTS) + len(VALIDATION) if tuning is Tuning.lora else plain
    assert len(lines_of(tmp_path / "training.jsonl")) == 2
    assert all("validation_objective" in line for line in lines_of(tmp_path / "training.jsonl"))


def test_a_pm_that_shares_the_base_stays_out_of_the_sampler(tmp_path: Path, played: type[Played]) -> None:
    model = load_sequence_scorer(TINY, new_head=True)
    model = get_peft_model(model, lora_config(LoraSettings(r=2), model, "SEQ_CLS", ["score"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "score" in name or "lora_B" in name:
                value.normal_(std=0.2)
    model.save_pretrained(tmp_path / "pm")
    load_tokenizer(TINY).save_pretrained(tmp_path / "pm")
    train_ppo(config(value_init=ValueInit.pm), TINY, PROMPTS, None, tmp_path, 0, preference_model=tmp_path / "pm")
    curve = lines_of(tmp_path / "training.jsonl")
    assert all(line["sampler_difference"] < 1e-5 for line in curve)
    assert curve[0]["value_mean"] != 0
    assert abs(curve[1]["kl"]) > 1e-3


@pytest.mark.parametrize(
    ("change", "again"), [({"vllm": SamplerVLLMConfig(url="http://x/v1")}, False), ({"epochs": 3}, True)]
)
def test_where_vllm_runs_is_no_reason_to_train_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], again: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        stages, "run_stage", lambda stage, output, settings, *rest, **more: seen.append(deciding(settings)) or output
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in range(1, 9)))
    for settings in (config(), config(**change)):
        train = TrainConfig(
            method=Method.ppo,
            policy=TINY,
            prompts=str(tmp_path / "prompts.jsonl"),
            ppo=settings,
            reward=Reward.labeler,
            constitution="warm",
            labeler=LabelerConfig(type=LabelerType.scripted),
        )
        stages.train_ppo_stage(stages.Arm(train, tmp_path, TINY), stages.labeler_reward(train))
    assert (seen[0] != seen[1]) == again


def test_a_run_goes_on_after_the_engine_died(
    tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(iterations=4)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    train_ppo(settings, TINY, PROMPTS, vowels, tmp_path / "whole", 0)
    monkeypatch.setattr(Played, "dies_at", 5)
    with pytest.raises(
        UserError, match=r"ended early: no message \(the same command goes on from the newest checkpoint"
    ):
        train_ppo(settings, TINY, PROMPTS, vowels, tmp_path / "cut", 0)
    assert played.opened[-1].closed
    assert not (tmp_path / "cut" / "sampler").exists()
    assert list((tmp_path / "cut" / "checkpoints").iterdir())
    monkeypatch.setattr(Played, "dies_at", None)
    train_ppo(settings, TINY, PROMPTS, vowels, tmp_path / "cut", 0)
    assert lines_of(tmp_path / "cut" / "training.jsonl") == lines_of(tmp_path / "whole" / "training.jsonl")


def test_a_refused_job_is_one_line(tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch) -> None:
    ppo = trainer(tmp_path)
    monkeypatch.setattr(Played, "take", lambda self, job: {"error": "ValueError: no\nroom"})
    with pytest.raises(UserError, match=r"^ppo\.sampler=vllm: ValueError: no room \(the same command"):
        ppo.rollout(0)


@pytest.mark.parametrize("tuning", [Tuning.lora, Tuning.full])
def test_a_start_that_is_an_adapter_is_merged_for_vllm(tmp_path: Path, played: type[Played], tuning: Tuning) -> None:
    policy = load_policy(TINY, Tuning.lora, LoraSettings(r=4, alpha=8))
    with shaken(policy, seed=3):
        policy.save(tmp_path / "sft")
    ppo = trainer(tmp_path, ModelConfig(name=str(tmp_path / "sft"), device="cpu"), tuning=tuning)
    check_sampler_follows(ppo)
    check_start(ppo, ppo.rollout(0))
    assert Path(played.opened[0].arguments["model"]).parent == tmp_path / "sampler"


def test_what_vllm_is_started_with(tmp_path: Path, played: type[Played]) -> None:
    settings = SamplerVLLMConfig(python=__file__, enforce_eager=True, engine_args={"max_num_seqs": 7})
    trainer(tmp_path, vllm=settings, lora=LoraSettings(r=9), max_prompt_length=50)
    trainer(tmp_path, dataclasses.replace(TINY, dtype=Dtype.bfloat16), tuning=Tuning.full, max_prompt_length=9000)
    lora, full = (process.arguments for process in played.opened)
    assert (lora["max_lora_rank"], lora["max_loras"], lora["max_cpu_loras"]) == (16, 1, 1)
    assert (lora["max_model_len"], full["max_model_len"]) == (56, 2048)
    assert (lora["max_num_seqs"], lora["enforce_eager"], lora["dtype"]) == (7, True, "float32")
    assert lora["logprobs_mode"] == "processed_logprobs"
    assert "enable_lora" not in full
    assert full["dtype"] == "bfloat16"


# What cannot work is said before anything expensive.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": Tuning.qlora}, "ppo.sampler=vllm with ppo.tuning=qlora"),
        ({"lora": LoraSettings(r=513)}, "ppo.lora.r=513: with ppo.sampler=vllm at most 512"),
        (
            {"tuning": Tuning.full, "vllm": SamplerVLLMConfig(url="http://localhost/v1")},
            "ppo.vllm.url with ppo.tuning=full",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)
    config(**changes, sampler=Sampler.hf)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_share_of_memory_is_a_share(value: float) -> None:
    with pytest.raises(ValueError, match=r"ppo\.vllm.gpu_memory_utilization"):
        SamplerVLLMConfig(gpu_memory_utilization=value)


def test_what_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"ppo\.vllm\.python=/nowhere: no such file"):
        check_sampler(config(vllm=SamplerVLLMConfig(python="/nowhere")), TINY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"ppo\.sampler=vllm runs in one process"):
        check_sampler(config(), TINY)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"ppo\.sampler=vllm: vLLM is not installed; run `make setup-vllm`"):
        check_sampler(config(vllm=SamplerVLLMConfig()), TINY)
    check_sampler(config(sampler=Sampler.hf), TINY)


@pytest.mark.parametrize("given", [{"adapter": "DIR"}, {"name": "DIR"}])
def test_a_server_cannot_have_a_start_that_is_an_adapter(tmp_path: Path, given: dict[str, str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    settings = config(vllm=SamplerVLLMConfig(url="http://127.0.0.1:1/v1"))
    start = dataclasses.replace(TINY, **dict.fromkeys(given, str(tmp_path)))
    with pytest.raises(UserError, match=r"ppo\.vllm\.url: PPO would start from other weights"):
        check_sampler(settings, start)
    with pytest.raises(UserError, match=r"ppo\.vllm\.url: PPO would start from other weights"):
        check_sampler(settings, TINY, sft_first=True)
    with pytest.raises(UserError, match=r"ppo\.vllm\.url=http://127.0.0.1:1/v1: cannot be reached"):
        check_sampler(settings, TINY)


def test_another_end_than_the_policys_is_not_taken(
    tmp_path: Path, played: type[Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo = trainer(tmp_path)
    monkeypatch.setattr(Played, "complete", lambda self, jobs: [{"tokens": [5], "finish": "stop", "logps": [-1.0]}])
    with pytest.raises(UserError, match="a completion ended at token 5; the policy's end at 258"):
        ppo.rollout(0)


def test_adapters_in_float32_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif.methods.ppo_sampler.pick_device", lambda name: torch.device("cuda"))
    with pytest.raises(UserError, match=r"set policy\.dtype=bfloat16"):
        check_sampler(config(), dataclasses.replace(TINY, dtype=Dtype.float32))
    check_sampler(config(), dataclasses.replace(TINY, dtype=Dtype.bfloat16))
    check_sampler(config(tuning=Tuning.full), dataclasses.replace(TINY, dtype=Dtype.float32))


# A process that speaks the worker's protocol up to its first answer.
SILENT = """#!{python}
import json, os, sys, time
from pathlib import Path
sys.stdin.readline()
Path({note!r}).write_text(str(os.getpid()))
{behaviour}
"""
READY = "print(json.dumps({'max_model_len': 200, 'vllm': 'played'}), flush=True)\n"


def silent(folder: Path, behaviour: str) -> str:
    """An interpreter that runs a process which notes its number."""
    python = folder / "python"
    python.write_text(SILENT.format(python=sys.executable, note=str(folder / "pid"), behaviour=behaviour))
    python.chmod(0o755)
    return str(python)


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and waiting to be counted."""
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.slow
def test_ctrl_c_ends_the_engine_too(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "ab" * n}) + "\n" for n in range(1, 9)))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "rlaif.train", "method=ppo", "policy.name=tiny", "ppo.sampler=vllm"),
            *("reward=labeler", "labeler=scripted", "constitution=warm", "eval.enabled=false"),
            f"ppo.vllm.python={silent(tmp_path, READY + 'time.sleep(600)')}",
            *(f"prompts={tmp_path / 'prompts.jsonl'}", f"output_dir={tmp_path / 'out'}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        # Where the tests run in the background, SIGINT is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    note, deadline = tmp_path / "pid", time.monotonic() + 120
    while not (note.is_file() and note.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert ended(int(note.read_text()))


@pytest.mark.parametrize(
    ("behaviour", "what"),
    [("sys.exit('RuntimeError: no such device')", "could not start"), (READY + "sys.exit('KeyError')", "ended early")],
)
def test_an_engine_that_dies_is_one_line(tmp_path: Path, behaviour: str, what: str) -> None:
    settings = config(vllm=SamplerVLLMConfig(python=silent(tmp_path, behaviour)))
    with pytest.raises(UserError) as caught:
        train_ppo(settings, TINY, PROMPTS, vowels, tmp_path, 0)
    assert str(caught.value).startswith(f"ppo.sampler=vllm: vLLM {what}: ")
    assert "\n" not in str(caught.value)
    assert ended(int((tmp_path / "pid").read_text()))


REAL = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed (make setup-vllm)"),
]


class Noted(VLLMProcess):
    """Notes the processes that were made."""

    opened: ClassVar[list[Noted]] = []

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Noted.opened.append(self)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid


class TestReal:
    """A real vLLM engine on a small model with random weights (heads of 32 numbers: vLLM has no kernel for less)."""

    pytestmark = REAL

    @pytest.fixture(scope="class")
    @staticmethod
    def small(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
        folder = tmp_path_factory.mktemp("small")
        tokenizer = load_tokenizer(TINY)
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=1024,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
            )
        )
        with torch.no_grad():
            model.lm_head.weight.mul_(8)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return ModelConfig(name=str(folder), device="cpu")

    @pytest.fixture(autouse=True)
    @staticmethod
    def bounded(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        monkeypatch.setattr("rlaif.methods.ppo_sampler.VLLMProcess", Noted)

    def settings(self, **changes: Any) -> PPOConfig:
        vllm = SamplerVLLMConfig(enforce_eager=True)
        return config(vllm=vllm, iterations=3, max_new_tokens=24, rollouts=16, eval_every=3, **changes)

    def test_an_adapter_is_followed_and_a_death_is_survived(self, tmp_path: Path, small: ModelConfig) -> None:
        rounds = 0

        def score(examples: Sequence[Example]) -> list[float]:
            nonlocal rounds
            rounds += 1
            if rounds == 2:
                os.killpg(Noted.opened[-1].pid, signal.SIGKILL)
            return vowels(examples)

        settings = self.settings(relative_reward=True, temperature=0.8)
        with pytest.raises(UserError, match="vLLM ended early") as caught:
            train_ppo(settings, small, PROMPTS, score, tmp_path, 0, VALIDATION)
        assert "\n" not in str(caught.value)
        assert (tmp_path / "checkpoints").is_dir()
        assert len(lines_of(tmp_path / "training.jsonl")) == 2
        train_ppo(settings, small, PROMPTS, score, tmp_path, 0, VALIDATION)
        curve = lines_of(tmp_path / "training.jsonl")
        assert [line["iteration"] for line in curve] == [0, 1, 2]
        # The policy is elsewhere by then: a sampler that stayed behind would be as far from it as the reference is.
        assert abs(curve[-1]["kl"]) > 0.05
        assert all(line["sampler_difference"] < 1e-4 for line in curve)
        assert "validation_kl" in curve[-1]

    def test_all_weights_are_followed(self, tmp_path: Path, small: ModelConfig) -> None:
        settings = self.settings(tuning=Tuning.full)
        train_ppo(settings, small, PROMPTS, vowels, tmp_path, 0, VALIDATION)
        curve = lines_of(tmp_path / "training.jsonl")
        assert abs(curve[-1]["kl"]) > 0.05
        assert all(line["sampler_difference"] < 1e-4 for line in curve)

    def test_completions_repeat_by_seed_end_truly_and_a_wrong_adapter_is_seen(
        self, tmp_path: Path, small: ModelConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings = self.settings(lora=LoraSettings(r=4, alpha=8, top_layers=0.5))
        policy = load_policy(small, settings.tuning, settings.lora)
        with VLLMSampler(policy, settings, tmp_path / "sampler") as sampler:
            ppo = PPOTrainer(settings, policy, PROMPTS, vowels, tmp_path, 0, VALIDATION, sampler=sampler)
            check_sampler_follows(ppo)
            prompts = [[row, 5, 6, 7] for row in range(40)]
            found = sampler.sample(prompts, [(0, 1, row) for row in range(40)])
            again = sampler.sample(prompts, [(0, 1, row) for row in range(40)])
            assert sum(one.tokens == other.tokens for one, other in zip(found, again, strict=True)) >= 38
            others = sampler.sample(prompts, [(1, 1, row) for row in range(40)])
            assert sum(one.tokens == other.tokens for one, other in zip(found, others, strict=True)) < 5
            ends = [generation.ended for generation in found + others]
            assert {True, False} == set(ends)
            for generation in found + others:
                assert generation.ended == (generation.tokens[-1] in sampler.eos)
                assert generation.ended or len(generation.tokens) == settings.max_new_tokens
            # What a cache of adapters by name would amount to.
            first = sampler.hand_over()
            monkeypatch.setattr(sampler, "hand_over", lambda: first)
            with pytest.raises(StartCheckError, match="does not take the weights over"):
                check_sampler_follows(ppo)
        assert not (tmp_path / "sampler").exists()

    @pytest.fixture
    @staticmethod
    def served(small: ModelConfig, tmp_path: Path) -> Iterator[str]:
        """The address of a ``vllm serve`` that takes adapters."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # What `vllm serve` runs. The command itself looks for a package named vllm, and the CPU build has another name.
        words = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(small.name)),
            *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "600", "--enforce-eager"),
            *("--dtype", "float32", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "1"),
            *("--logprobs-mode", "processed_logprobs"),
        ]
        env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        log = tmp_path / "serve.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                words, env={**os.environ, **env}, stdout=file, stderr=file, start_new_session=True
            )
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5),
                ):
                    break
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def test_a_server_follows_the_adapter(self, tmp_path: Path, small: ModelConfig, served: str) -> None:
        settings = dataclasses.replace(
            self.settings(relative_reward=True, temperature=0.8), vllm=SamplerVLLMConfig(url=served)
        )
        check_sampler(settings, small)
        train_ppo(settings, small, PROMPTS, vowels, tmp_path, 0, VALIDATION)
        curve = lines_of(tmp_path / "training.jsonl")
        assert abs(curve[-1]["kl"]) > 0.05
        assert all(line["sampler_difference"] < 1e-4 for line in curve)
        with urllib.request.urlopen(f"{served}/models", timeout=5) as response:
            assert len(json.load(response)["data"]) == 1  # no adapter is left
        with torch.no_grad():
            policy = load_policy(small, settings.tuning, settings.lora)
            policy.model.get_input_embeddings().weight.mul_(1.5)
        with VLLMSampler(policy, settings, tmp_path / "sampler") as sampler:
            ppo = PPOTrainer(settings, policy, PROMPTS, vowels, tmp_path, 0, VALIDATION, sampler=sampler)
            with pytest.raises(StartCheckError, match="it serves another model"):
                check_sampler_follows(ppo)
