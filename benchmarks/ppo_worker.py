"""What :mod:`benchmarks.ppo` runs in processes of their own: ``python -m benchmarks.ppo_worker TASK SETTINGS``.

The last line of the output is the result as JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.against_trl import stock_lm
from rlaif import losses
from rlaif.chat import encode_chat
from rlaif.config import Dtype, LoraSettings, ModelConfig
from rlaif.models import load_causal_lm, load_sequence_scorer, load_tokenizer, lora_config
from rlaif.preference_model import separate_pad_token
from rlaif.records import find_prompts, read_prompts

MODEL = ModelConfig(name="embedded", device="cpu")
TINY = ModelConfig(name="tiny", device="cpu")
LORA = LoraSettings(r=16, alpha=32)


def peak_mb() -> int:
    """The largest resident size of this process so far; on a GPU, the most that was allocated there."""
    if MODEL.device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def random_scorer(config: ModelConfig) -> Any:
    """A sequence classifier with a head of random numbers."""
    model = load_sequence_scorer(config, new_head=True)
    torch.nn.init.normal_(model.score.weight, std=0.05)
    return model


def make_pm(settings: dict[str, Any]) -> dict[str, Any]:
    """A PM with a random head, as an adapter on the embedded model: its scores do not matter here, its work does."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = random_scorer(MODEL)
    model = get_peft_model(model, lora_config(LORA, model, "SEQ_CLS", ["score"]))
    model.save_pretrained(settings["folder"] + "/pm")
    tokenizer = load_tokenizer(MODEL)
    separate_pad_token(tokenizer)
    tokenizer.save_pretrained(settings["folder"] + "/pm")
    return {}


class Operations(TorchDispatchMode):
    """Counts the floating point operations of products and attention while it is active.

    torch's own ``FlopCounterMode`` also follows modules, and fails on passes without gradients between those with.
    """

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        count = flop_registry.get(function.overloadpacket)
        if count is not None:
            self.total += count(*arguments, **(settings or {}), out_val=result)
        return result


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Our PPO for a few rounds, and one more in which operations are counted, which takes longer."""
    from rlaif.config import PPOConfig
    from rlaif.methods.ppo import PPOTrainer, train_ppo

    counter, peak, step = Operations(), 0, PPOTrainer.step

    def counted(trainer: Any, iteration: int) -> Any:
        nonlocal peak
        if iteration < settings["iterations"]:
            return step(trainer, iteration)
        peak = peak_mb()
        with counter:
            return step(trainer, iteration)

    PPOTrainer.step = counted  # type: ignore[method-assign]
    config = PPOConfig(
        lora=LORA,
        iterations=settings["iterations"] + 1,
        rollouts=settings["rollouts"],
        minibatch_size=settings["minibatch_size"],
        micro_batch_size=min(PPOConfig.micro_batch_size, settings["minibatch_size"]),
        max_new_tokens=settings["max_new_tokens"],
        epochs=2,
        learning_rate=1e-5,
        save_every=1000,
    )
    folder = Path(settings["folder"]) / f"ours-{time.time_ns()}"
    folder.mkdir()
    prompts = read_prompts(find_prompts("everyday"))
    train_ppo(config, MODEL, prompts, None, folder, 0, preference_model=Path(settings["folder"]) / "pm")
    lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()][1:-1]
    total = sum(line["seconds"] for line in lines)
    names = ("sampling", "scoring", "reference", "update")
    parts = {name: sum(line[f"seconds_{name}"] for line in lines) / total for name in names}
    # The policy's own figures once more, packing, checks and logging.
    parts["other"] = 1 - sum(parts.values())
    return {
        "rounds": [line["seconds"] for line in lines],
        "peak_mb": peak,
        "parts": parts,
        "operations": counter.total,
        "peak_operations_per_s": peak_operations(),
    }


def peak_operations() -> float:
    """Operations a second of a product of two large matrices, the best of some."""
    left, right = torch.randn(2, 4096, 4096, device=MODEL.device).to(getattr(torch, MODEL.dtype)).unbind()
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * 4096**3 / best


def trl(settings: dict[str, Any], lean: bool = False) -> dict[str, Any]:
    """TRL's PPO for a few rounds."""
    from transformers import TrainerCallback

    rounds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **values: Any) -> None:
            rounds.append(time.perf_counter())

    model, value, reward = stock_lm(MODEL), random_scorer(MODEL), pm_of(settings)
    if lean:
        value.model.requires_grad_(False)
    trainer = trl_trainer(MODEL, model, value, reward, settings, [Clock()])
    started = time.perf_counter()
    trainer.train()
    marks = [started, *rounds]
    seconds = [round(after - before, 3) for before, after in itertools.pairwise(marks)][1:]
    return {"rounds": seconds, "peak_mb": peak_mb()}


def pm_of(settings: dict[str, Any]) -> Any:
    """The PM as a whole model."""
    return load_sequence_scorer(replace(MODEL, name=settings["folder"] + "/pm")).merge_and_unload()


def trl_trainer(
    config: ModelConfig, model: Any, value: Any, reward: Any, settings: dict[str, Any], callbacks: Any, **changes: Any
) -> Any:
    """TRL's trainer at our settings."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = load_tokenizer(config)
    separate_pad_token(tokenizer)  # TRL reads masks off the tokens: pad must not be eos.
    for one in (model, value, reward):
        one.config.pad_token_id = tokenizer.pad_token_id
    prompts = read_prompts(find_prompts("everyday"))
    minibatches = settings["rollouts"] // settings["minibatch_size"]
    arguments = PPOConfig(
        output_dir=settings["folder"] + "/trl",
        per_device_train_batch_size=settings["minibatch_size"],
        gradient_accumulation_steps=minibatches,
        num_mini_batches=minibatches,
        local_rollout_forward_batch_size=64,
        total_episodes=settings["rollouts"] * settings["iterations"],
        response_length=settings["max_new_tokens"],
        stop_token="eos",
        temperature=1.0,
        num_ppo_epochs=2,
        learning_rate=1e-5,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=MODEL.device == "cpu",
        disable_tqdm=True,
        seed=0,
        **changes,
    )
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list([{"input_ids": encode_chat(tokenizer, one.messages)} for one in prompts]),
        callbacks=callbacks,
        peft_config=lora_config(LORA, model, "CAUSAL_LM"),
    )


def trl_maths(settings: dict[str, Any]) -> dict[str, Any]:
    """Largest differences between our maths and what TRL's own loop computes on the tiny model.

    TRL has most of its maths inside ``train``. Its two masked statistics are called there at the right moments, so
    while it trains they are replaced by functions that look at the variables of ``train`` and then do their work.
    """
    import tempfile

    from trl.experimental.ppo import ppo_trainer

    differences: dict[str, float] = {}

    def note(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        differences[name] = max(differences.get(name, 0.0), float((left - right).abs().max()))

    def at_whiten(values: Any, mask: Any, shift_mean: bool = True) -> Any:
        found = sys._getframe(1).f_locals
        if not shift_mean:
            return whiten(values, mask, shift_mean)
        real, wide = (~found["padding_mask"]).float(), (~found["padding_mask_p1"]).float()
        estimate = losses.kl_k1 if found["args"].kl_estimator == "k1" else losses.kl_k3
        kl = estimate(found["logprobs"], found["ref_logprobs"])
        note(f"kl_{found['args'].kl_estimator}", kl * real, found["kl"] * real)
        # TRL pays the score one place after the end token where there is one, we at the end token itself.
        last = found["actual_end"] + 1 - wide.sum(dim=1)
        assert not last.any()
        ours = losses.shaped_rewards(found["scores"], kl, wide, found["args"].kl_coef)
        if found["args"].whiten_rewards:
            # Ours divides by n, TRL's by n - 1.
            count = wide.sum()
            ours_white = losses.whiten(ours, wide, shift_mean=False)
            mean = losses.masked_mean(ours, wide)
            ours = ((ours_white - mean) * ((count - 1) / count).sqrt() + mean) * wide
            note("whitened_rewards", ours, found["rewards"] * wide)
        else:
            note("rewards", ours, found["rewards"] * wide)
        advantages, returns = losses.gae(
            found["rewards"], found["values"], wide, found["args"].gamma, found["args"].lam
        )
        note("advantages", advantages, found["advantages"] * wide)
        note("returns", returns, found["returns"] * wide)
        result = whiten(values, mask)
        count = real.sum()
        note("whitening", losses.whiten(values, real) * ((count - 1) / count).sqrt(), result * real)
        return result

    def at_mean(values: Any, mask: Any, axis: Any = None) -> Any:
        found = sys._getframe(1).f_locals
        if "pg_loss_max" in found and values is found["pg_loss_max"]:
            args, real = found["args"], mask.float()
            ours, _ = losses.ppo_policy_loss(
                found["new_logprobs"], found["mb_logprobs"], found["mb_advantage"], real, args.cliprange
            )
            note("policy_loss", losses.masked_mean(ours, real), mean(values, mask))
            wide = (~found["padding_mask_p1"][found["micro_batch_inds"]]).float()
            value = losses.ppo_value_loss(found["vpred"], found["mb_values"], found["mb_return"], args.cliprange_value)
            note("value_loss", losses.masked_mean(value, wide), found["vf_loss"])
            logps = losses.token_logps(found["logits"], found["mb_responses"])
            note("logps", logps * real, found["new_logprobs"] * real)
        return mean(values, mask) if axis is None else mean(values, mask, axis)

    whiten, mean = ppo_trainer.masked_whiten, ppo_trainer.masked_mean
    ppo_trainer.masked_whiten, ppo_trainer.masked_mean = at_whiten, at_mean
    for estimator, white in (("k1", False), ("k3", True)):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(1)
            model, value, reward = load_causal_lm(TINY), random_scorer(TINY), random_scorer(TINY)
            sizes = {"rollouts": 32, "max_new_tokens": 8, "iterations": 2, "minibatch_size": 8, "folder": folder}
            changes = {"kl_estimator": estimator, "whiten_rewards": white, "gamma": 0.97, "lam": 0.9}
            trl_trainer(TINY, model, value, reward, sizes, [], **changes).train()
    return {name: float(f"{value:.1e}") for name, value in sorted(differences.items())}


def prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """What an episode costs with few and with many prompts, on the tiny model."""
    import statistics
    import tempfile

    from rlaif.config import PPOConfig, Tuning
    from rlaif.methods.ppo import PPOTrainer
    from rlaif.policy import load_policy
    from rlaif.records import Prompt

    config = PPOConfig(
        lora=LoraSettings(r=4), iterations=10_000, rollouts=32, max_new_tokens=8, learning_rate=1e-6, linear_decay=False
    )
    ready: dict[int, Any] = {}
    seconds: dict[int, list[float]] = {}
    for count in settings["counts"]:
        many = [Prompt(f"p{i}", ({"role": "user", "content": f"Tell me about {i}."},)) for i in range(count)]
        policy = load_policy(TINY, Tuning.lora, config.lora)
        folder = Path(tempfile.mkdtemp())
        ready[count] = PPOTrainer(
            config, policy, many, lambda examples: [float(len(each.completion)) for each in examples], folder, 0
        )
        seconds[count] = []
        ready[count].step(0)
    for iteration in range(1, settings["rounds"] + 1):
        for count, trainer in ready.items():
            began = time.perf_counter()
            trainer.step(iteration)
            seconds[count].append(time.perf_counter() - began)
    few, many_ = (statistics.median(seconds[count]) for count in settings["counts"])
    return {"cost_ratio_100k_to_1k": round(many_ / few, 3)}


TASKS = {
    "make_pm": make_pm,
    "ours": ours,
    "trl": trl,
    "trl_lean": lambda settings: trl(settings, lean=True),
    "trl_maths": trl_maths,
    "prompts": prompts,
}

if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    MODEL.dtype, MODEL.device = Dtype(given.get("dtype", "float32")), given.get("device", "cpu")
    print(json.dumps(TASKS[sys.argv[1]](given)))
