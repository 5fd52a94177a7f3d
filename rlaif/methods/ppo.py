"""PPO with a preference model (Schulman et al. 2017; Ouyang et al. 2022).

Each iteration samples completions, scores them with the PM, shapes a per-token reward with the KL to the
reference, estimates advantages and makes a few clipped updates. Details follow Huang et al. (2024), "The N
Implementation Details of RLHF with PPO". Everything random is a function of (seed, iteration, episode), so a run
that goes on from a checkpoint makes the same numbers as one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlaif import losses
from rlaif.chat import encode_chat
from rlaif.config import KLControl, ModelConfig, PPOConfig, Tuning
from rlaif.generation import (
    STREAM_MINIBATCHES,
    STREAM_PROMPTS,
    STREAM_ROLLOUT,
    generate,
    head_inputs,
)
from rlaif.methods.ppo_checks import check_start
from rlaif.models import eos_ids, seed_everything
from rlaif.policy import Packed, Policy, completion_logits, load_policy, merged, pack
from rlaif.progress import progress
from rlaif.records import Prompt, UserError, read_json, write_json
from rlaif.trunk import with_trunk

log = logging.getLogger("rlaif")

ScoreFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]


@dataclass
class Rollouts:
    """A batch of episodes. Tensors are (B, T) over completion tokens; ``scores`` is (B,)."""

    batch: Packed
    texts: list[str]
    ended: Tensor
    scores: Tensor
    logps: Tensor
    ref_logps: Tensor
    values: Tensor


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    iteration: int = 0
    kl_coef: float = 0.0
    score_mean: float | None = None
    score_std: float | None = None


class ValueHead(nn.Module):
    """A linear value on the policy's last hidden state, zero at the start."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T)."""
        return self.linear(hidden.float()).squeeze(-1)


def train_ppo(
    config: PPOConfig,
    start: ModelConfig,
    prompts: Sequence[Prompt],
    score: ScoreFunction,
    folder: Path,
    seed: int,
) -> Path:
    """Train a policy; writes ``policy/`` and ``training.jsonl`` into ``folder``.

    Args:
        config: hyperparameters.
        start: the starting policy, which is also the reference.
        prompts: training prompts.
        score: scores of completions, one per prompt; higher is better.
        folder: where to write; a ``checkpoints`` folder found there is gone on from.
        seed: of everything random.

    Raises:
        UserError: if no prompt fits ``max_prompt_length``.
    """
    seed_everything(seed)
    policy = load_policy(start, config.tuning, config.lora)
    if config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable()
        policy.model.enable_input_require_grads()
    trainer = PPOTrainer(config, policy, prompts, score, folder, seed)
    trainer.train()
    policy.save(folder / "policy")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return folder / "policy"


class PPOTrainer:
    """The PPO loop and its state."""

    def __init__(
        self,
        config: PPOConfig,
        policy: Policy,
        prompts: Sequence[Prompt],
        score: ScoreFunction,
        folder: Path,
        seed: int,
    ) -> None:
        self.config, self.policy, self.score, self.folder, self.seed = config, policy, score, folder, seed
        self.model, self.tokenizer = policy.model, policy.tokenizer
        self.device = next(self.model.parameters()).device
        self.pad, self.eos = self.tokenizer.pad_token_id, eos_ids(self.model, self.tokenizer)
        encoded = [(prompt, encode_chat(self.tokenizer, prompt.messages)) for prompt in prompts]
        self.prompts = [(prompt, ids) for prompt, ids in encoded if len(ids) <= config.max_prompt_length]
        if len(self.prompts) < len(encoded):
            log.warning(
                "ppo: %d of %d prompts are longer than ppo.max_prompt_length=%d and left out",
                len(encoded) - len(self.prompts),
                len(encoded),
                config.max_prompt_length,
            )
        if not self.prompts:
            raise UserError(f"ppo.max_prompt_length={config.max_prompt_length}: no prompt is that short")
        self.value_head = ValueHead(self.model.config.get_text_config().hidden_size).to(self.device)
        self.parameters = [parameter for _, parameter in policy.trainable()]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.parameters, "peak": config.learning_rate},
                {"params": list(self.value_head.parameters()), "peak": config.value_learning_rate},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=0.0,
        )
        self.progress = Progress(kl_coef=config.kl_coef)
        # All-weights training keeps float32 weights; on a GPU the arithmetic is bfloat16.
        self.autocast = self.device.type == "cuda" and config.tuning is Tuning.full

    def train(self) -> None:
        """Run the remaining iterations."""
        config = self.config
        self.load_checkpoint()
        first = self.progress.iteration
        self._truncate_log(first)
        if first:
            log.info("ppo: going on from iteration %d", first)
        with (
            (self.folder / "training.jsonl").open("a", encoding="utf-8") as journal,
            progress(config.iterations, "ppo", "iteration", initial=first) as bar,
        ):
            for iteration in range(first, config.iterations):
                line = self.step(iteration)
                journal.write(json.dumps(line) + "\n")
                journal.flush()
                bar.set_postfix_str(f"score {line['score']:+.2f} kl {line['kl']:.2f}", refresh=False)
                bar.update()
                self.progress.iteration = iteration + 1
                if (iteration + 1) % config.save_every == 0 and iteration + 1 < config.iterations:
                    self.save_checkpoint()

    def step(self, iteration: int) -> dict[str, Any]:
        """One iteration: rollouts, rewards, advantages, updates. Returns its line of the training curve."""
        config = self.config
        started = time.perf_counter()
        rollouts = self.rollout(iteration)
        sampled = time.perf_counter()
        if iteration == 0:
            check_start(self, rollouts)
        mask = rollouts.batch.completion_mask
        kl = losses.kl_k1(rollouts.logps, rollouts.ref_logps)
        normalized = self.normalize(rollouts.scores) - config.missing_eos_penalty * (~rollouts.ended).float()
        rewards = losses.shaped_rewards(normalized, kl, mask, self.progress.kl_coef)
        advantages, returns = losses.gae(rewards, rollouts.values, mask, config.gamma, config.gae_lambda)
        if config.whiten_advantages:
            advantages = losses.whiten(advantages, mask)
        statistics = self.update(iteration, rollouts, advantages, returns)
        sequence_kl = float((kl * mask).sum(dim=1).mean())
        line = {
            "method": "ppo",
            "iteration": iteration,
            "episodes": (iteration + 1) * config.rollouts,
            "score": float(rollouts.scores.mean()),
            "kl": sequence_kl,
            "reward": float(rewards.sum(dim=1).mean()),
            # The mean of -log p over the policy's own samples estimates its entropy without bias.
            "entropy": float(losses.masked_mean(-rollouts.logps, mask)),
            "length": float(mask.sum(dim=1).mean()),
            "eos_rate": float(rollouts.ended.float().mean()),
            "kl_coef": self.progress.kl_coef,
            "value_mean": float(losses.masked_mean(rollouts.values, mask)),
            "seconds": round(time.perf_counter() - started, 3),
            "seconds_rollout": round(sampled - started, 3),
            **statistics,
        }
        bad = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise UserError(
                f"ppo: iteration {iteration} gave {', '.join(bad)} that is not finite; lower ppo.learning_rate, "
                "or set policy.dtype=float32"
            )
        if config.kl_control is KLControl.adaptive:
            self.progress.kl_coef = losses.adaptive_kl_coef(
                self.progress.kl_coef, sequence_kl, config.kl_target, config.rollouts, config.kl_horizon
            )
        return line

    def rollout(self, iteration: int) -> Rollouts:
        """Sample episodes, score them, and evaluate policy, value and reference on them once."""
        config = self.config
        chosen = [self.prompts[index] for index in self.draw_prompts(iteration)]
        generations: list[Any] = []
        with merged(self.model) as sampler:
            for start in range(0, len(chosen), config.rollout_batch_size):
                part = chosen[start : start + config.rollout_batch_size]
                generations += generate(
                    sampler,
                    [ids for _, ids in part],
                    [(self.seed, STREAM_ROLLOUT, iteration, start + offset, 1) for offset in range(len(part))],
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    eos=self.eos,
                    pad=self.pad,
                    observe=self.value_head,
                )
        texts = [
            self.tokenizer.decode(generation.tokens, skip_special_tokens=True).strip() for generation in generations
        ]
        scores = self.score([prompt for prompt, _ in chosen], texts)
        batch = pack(
            [ids for _, ids in chosen],
            [generation.tokens for generation in generations],
            self.pad,
            self.device,
        )
        batch = with_trunk(self.model, batch, self.micro_batches(batch))
        if next(self.model.parameters()).dtype == torch.float32 and not self.autocast:
            # The sampler's own figures: in float32, merged weights give those of the training forward pass.
            logps, values = (
                self.padded([getattr(generation, name) for generation in generations], batch)
                for name in ("logps", "values")
            )
        else:
            logps, values = self.evaluate_policy(batch)
        return Rollouts(
            batch=batch,
            texts=texts,
            ended=torch.tensor([generation.ended for generation in generations], device=self.device),
            scores=torch.tensor(list(scores), dtype=torch.float32, device=self.device),
            logps=logps,
            ref_logps=self.evaluate_reference(batch),
            values=values,
        )

    def padded(self, rows: Sequence[Sequence[float]], batch: Packed) -> Tensor:
        """Figures of each completion's tokens as (B, T), 0 after its end."""
        result = torch.zeros(batch.tokens.shape)
        for index, row in enumerate(rows):
            result[index, : len(row)] = torch.tensor(row)
        return result.to(self.device)

    def draw_prompts(self, iteration: int) -> list[int]:
        """Indices of this iteration's prompts: the set is gone through in a new order each time around."""
        count, size = self.config.rollouts, len(self.prompts)
        positions = range(iteration * count, (iteration + 1) * count)
        orders = {
            epoch: np.random.default_rng([self.seed, STREAM_PROMPTS, epoch, 0, 1]).permutation(size)
            for epoch in {position // size for position in positions}
        }
        return [int(orders[position // size][position % size]) for position in positions]

    @torch.no_grad()
    def evaluate_policy(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the current policy: two (B, T)."""
        logps, values = (torch.zeros(batch.tokens.shape, device=self.device) for _ in range(2))
        for rows in self.micro_batches(batch):
            part = batch.select(rows)
            logits, value = self.forward(part)
            width = part.tokens.shape[1]
            logps[rows, :width] = losses.token_logps(logits, part.tokens) * part.completion_mask
            values[rows, :width] = value * part.completion_mask
        return logps, values

    @torch.no_grad()
    def evaluate_reference(self, batch: Packed) -> Tensor:
        """Log-probabilities of the reference: (B, T)."""
        logps = torch.zeros(batch.tokens.shape, device=self.device)
        with self.policy.reference() as reference:
            for rows in self.micro_batches(batch):
                part = batch.select(rows)
                logits = completion_logits(reference, part, self.config.temperature)
                width = part.tokens.shape[1]
                logps[rows, :width] = losses.token_logps(logits, part.tokens) * part.completion_mask
        return logps

    def forward(self, batch: Packed) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) at the sampling temperature and values (B, T) of one forward pass."""
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast),
            head_inputs(self.model) as hidden,
        ):
            logits = completion_logits(self.model, batch, self.config.temperature)
            states = hidden()[:, -batch.tokens.shape[1] - 1 : -1]
        # The value learns on the policy's features without pulling on them.
        return logits, self.value_head(states.detach())

    def micro_batches(self, batch: Packed) -> list[Tensor]:
        """Rows in micro-batches of similar length."""
        order = batch.mask.sum(dim=1).argsort()
        return list(order.split(self.config.micro_batch_size))

    def normalize(self, scores: Tensor) -> Tensor:
        """Standardise scores by the reference policy's, then clip.

        The first iteration's completions come from the reference policy (the adapter is still zero), so its mean
        and deviation are taken there and kept.
        """
        config = self.config
        if config.normalize_scores:
            if self.progress.score_mean is None or self.progress.score_std is None:
                self.progress.score_mean = float(scores.mean())
                self.progress.score_std = float(scores.std(unbiased=False))
            scores = (scores - self.progress.score_mean) / max(self.progress.score_std, 1e-6)
        return scores.clamp(-config.score_clip, config.score_clip)

    def update(self, iteration: int, rollouts: Rollouts, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Minibatch epochs over the rollouts. Returns means over all updates."""
        config = self.config
        decay = 1 - iteration / config.iterations if config.linear_decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * decay
        train_policy = iteration >= config.warmup_iterations
        sums: dict[str, float] = {}
        steps = 0
        for epoch in range(config.epochs):
            order = np.random.default_rng([self.seed, STREAM_MINIBATCHES, iteration, epoch, 1]).permutation(
                len(rollouts.batch)
            )
            for rows in torch.from_numpy(order).to(self.device).split(config.minibatch_size):
                for name, value in self.minibatch(rows, rollouts, advantages, returns, train_policy).items():
                    sums[name] = sums.get(name, 0.0) + value
                steps += 1
        return {name: value / steps for name, value in sums.items()}

    def minibatch(
        self, rows: Tensor, rollouts: Rollouts, advantages: Tensor, returns: Tensor, train_policy: bool
    ) -> dict[str, float]:
        """One optimiser step on some episodes, in micro-batches whose gradients add up."""
        config = self.config
        total = rollouts.batch.completion_mask[rows].sum()
        statistics = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio_mean"), 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for part in rows.split(config.micro_batch_size):
            batch = rollouts.batch.select(part)
            width = batch.tokens.shape[1]
            mask, old_logps = batch.completion_mask, rollouts.logps[part, :width]
            logits, values = self.forward(batch)
            logps = losses.token_logps(logits, batch.tokens)
            policy_loss, clipped = losses.ppo_policy_loss(
                logps * mask, old_logps, advantages[part, :width], mask, config.clip_range
            )
            value_loss = losses.ppo_value_loss(
                values, rollouts.values[part, :width], returns[part, :width], config.value_clip_range
            )
            # Sums over the minibatch's tokens, so that micro-batches do not change the gradient.
            policy_term = policy_loss.sum() / total
            value_term = (value_loss * mask).sum() / total
            loss = config.value_coef * value_term
            if train_policy:
                loss = loss + policy_term
            if config.entropy_coef:
                loss = loss - config.entropy_coef * (losses.entropy(logits) * mask).sum() / total
            loss.backward()
            with torch.no_grad():
                log_ratio = (logps - old_logps) * mask
                statistics["policy_loss"] += policy_term.item()
                statistics["value_loss"] += value_term.item()
                statistics["clip_fraction"] += (clipped.sum() / total).item()
                statistics["approx_kl"] += ((log_ratio.expm1() - log_ratio).sum() / total).item()
                statistics["ratio_mean"] += ((log_ratio.exp() * mask).sum() / total).item()
        if not train_policy:
            for parameter in self.parameters:
                parameter.grad = None
        parameters = [*self.parameters, *self.value_head.parameters()]
        statistics["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
        self.optimizer.step()
        return statistics

    def save_checkpoint(self) -> None:
        """Write a checkpoint that is complete or absent, then drop older ones."""
        root = self.folder / "checkpoints"
        final = root / f"iteration-{self.progress.iteration:06d}"
        temporary = root / f".{final.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        tensors = {
            "policy": {name: value.detach() for name, value in self.policy.trainable()},
            "value_head": self.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(tensors, temporary / "state.pt")
        write_json(temporary / "progress.json", vars(self.progress))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for other in root.glob("iteration-*"):
            if other != final:
                shutil.rmtree(other)

    def load_checkpoint(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if not found:
            return
        tensors = torch.load(found[-1] / "state.pt", map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.policy.trainable():
                parameter.copy_(tensors["policy"][name])
        self.value_head.load_state_dict(tensors["value_head"])
        self.optimizer.load_state_dict(tensors["optimizer"])
        self.progress = Progress(**read_json(found[-1] / "progress.json"))

    def _truncate_log(self, iterations: int) -> None:
        """Drop lines of the training curve that came after the checkpoint."""
        file = self.folder / "training.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
        file.write_text("".join(lines[:iterations]), encoding="utf-8")
