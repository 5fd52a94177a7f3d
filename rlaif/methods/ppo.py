"""PPO with a preference model (Schulman et al. 2017; Ouyang et al. 2022).

Each iteration samples completions, scores them with the PM, shapes a per-token reward with the KL to the
reference, estimates advantages and makes a few clipped updates. Details follow Huang et al. (2024), "The N
Implementation Details of RLHF with PPO". Everything random is a function of (seed, iteration, episode), so a run
that goes on from a checkpoint makes the same numbers as one that was never interrupted.

Several processes share the work, not the batch: each samples, scores and evaluates its share of the episodes and all
get all figures, so that advantages, statistics and decisions are those of one process. Of every minibatch each takes
its rows, and the gradients add up before they are clipped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlaif import losses, sharding
from rlaif.artifacts import plain
from rlaif.attention import plain_attention
from rlaif.chat import encode_chat
from rlaif.config import Keep, KLControl, KLEstimator, ModelConfig, PPOConfig, ValueInit
from rlaif.generation import STREAM_BASELINE, STREAM_EVALUATION, STREAM_MINIBATCHES, STREAM_ROLLOUT
from rlaif.methods.divergence import check_figures, check_weights
from rlaif.methods.ppo_checkpoint import Checkpoints, Progress
from rlaif.methods.ppo_checks import check_sampler_follows, check_start, validation_prompts
from rlaif.methods.ppo_rollout import Actor, PromptStream, Rollouts, ScoreFunction
from rlaif.methods.ppo_sampler import VLLMSampler, open_sampler
from rlaif.methods.ppo_view import View
from rlaif.methods.trackers import Trackers
from rlaif.models import seed_everything
from rlaif.policy import Policy, load_policy
from rlaif.preference_model import check_same_base, load_preference_model, pm_config, read_head
from rlaif.processes import add_up, copy_from_main, is_main, spread, wait_for_all
from rlaif.progress import keep_lines
from rlaif.records import Example, Prompt, UserError
from rlaif.trunk import recomputing

log = logging.getLogger("rlaif")

KL = {KLEstimator.k1: losses.kl_k1, KLEstimator.k2: losses.kl_k2, KLEstimator.k3: losses.kl_k3}


def train_ppo(
    config: PPOConfig,
    start: ModelConfig,
    prompts: Sequence[Prompt],
    score: ScoreFunction | None,
    folder: Path,
    seed: int,
    validation: Sequence[Prompt] = (),
    preference_model: Path | None = None,
) -> Path:
    """Train a policy; writes ``policy/``, ``training.jsonl`` and ``samples.jsonl`` into ``folder``.

    Args:
        config: hyperparameters.
        start: the starting policy, which is also the reference.
        prompts: training prompts.
        score: scores of completions; higher is better. Several processes call it together, with the same completions.
            None: the PM's, which then shares the policy's base model where both are adapters on
            the same one.
        folder: where to write; a ``checkpoints`` folder found there is gone on from.
        seed: of everything random.
        validation: prompts to measure the policy on; needed with ``eval_every``.
        preference_model: folder of the PM; needed without ``score``, and with ``value_init=pm``.

    Raises:
        UserError: if no prompt fits ``max_prompt_length``, or the PM's head does not fit the policy.
    """
    seed_everything(seed)
    head = None
    if config.value_init is ValueInit.pm:
        assert preference_model is not None
        check_same_base(preference_model, start)
        head = read_head(preference_model)
    policy = load_policy(start, config.tuning, config.lora)
    if score is None:
        assert preference_model is not None
        pm = load_preference_model(pm_config(start, preference_model), policy)
        if pm.model is not policy.model:
            sharding.spread_weights(pm.model)

        def score(examples: Sequence[Example]) -> list[float]:
            with sharding.gathered(pm.model):
                return spread(pm.score, examples)

    with open_sampler(policy, config, folder) as sampler:
        trainer = PPOTrainer(config, policy, prompts, score, folder, seed, validation, head, sampler, preference_model)
        trainer.train()
    sharding.gather_weights(policy.model)
    wait_for_all()
    check_weights("ppo", policy.model)
    if is_main():
        policy.save(folder / "policy")
        trainer.checkpoints.remove()
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
        validation: Sequence[Prompt] = (),
        head: tuple[Tensor, Tensor] | None = None,
        sampler: VLLMSampler | None = None,
        preference_model: Path | None = None,
    ) -> None:
        self.config, self.policy, self.score, self.folder, self.seed = config, policy, score, folder, seed
        self.actor = Actor(policy, config, sampler, None if head is None else preference_model)
        self.device = self.actor.device
        self.stream = PromptStream(prompts, policy.tokenizer, config.max_prompt_length, seed)
        self.validation = validation_prompts(validation, policy.tokenizer, config)
        self.pm_head = head
        self.value_head = self.actor.value_head
        if head is not None and head[0].shape[-1] != self.value_head.linear.in_features:
            raise UserError(
                f"ppo.value_init=pm: the PM's head reads {head[0].shape[-1]} features, the policy has "
                f"{self.value_head.linear.in_features}; give ppo.value_init=zero"
            )
        self.value_adapter = self.actor.value_adapter
        self.value_parameters = list(self.value_head.parameters())
        if self.value_adapter is not None:
            self.value_parameters += self.value_adapter.named.values()
        copy_from_main(value.data for _, value in policy.trainable())
        copy_from_main(value.data for value in self.value_parameters)
        sharding.spread_weights(policy.model, short=self.actor.autocast)
        if policy.frozen is not None:
            sharding.spread_weights(policy.frozen)
        self.parameters = [parameter for _, parameter in policy.trainable()]
        self.optimizer = sharding.adamw(
            [
                {"params": self.parameters, "peak": config.rate},
                {"params": self.value_parameters, "peak": config.value_learning_rate},
            ],
            lr=config.rate,
            betas=(0.9, 0.95),
            eps=config.adam_epsilon,
            weight_decay=0.0,
        )
        self.progress = Progress(kl_coef=config.kl_coef)
        self.checkpoints = Checkpoints(folder)
        self.seconds: dict[str, float] = {}

    def train(self) -> None:
        """Run the remaining iterations, and leave the policy that ``keep`` asks for."""
        config = self.config
        self.load_checkpoint()
        first = self.progress.iteration
        if is_main():
            for name in ("training.jsonl", "samples.jsonl"):
                keep_lines(self.folder / name, "iteration", first - 1)
        if first:
            log.info("ppo: going on from iteration %d", first)
        if self.actor.sampler is not None and first < config.iterations:
            check_sampler_follows(self)
        with (
            (self.folder / "training.jsonl" if is_main() else Path(os.devnull)).open("a", encoding="utf-8") as curve,
            (self.folder / "samples.jsonl" if is_main() else Path(os.devnull)).open("a", encoding="utf-8") as samples,
            Trackers(config.report_to, self.folder, first, plain(ppo=config.resolved())["ppo"]) as trackers,
            View(config.iterations, first) as view,
        ):
            for iteration in range(first, config.iterations):
                line, rollouts = self.step(iteration)
                if config.eval_every and (
                    (iteration + 1) % config.eval_every == 0 or iteration + 1 == config.iterations
                ):
                    line |= self.measure(iteration)
                chosen = [{"iteration": iteration} | sample for sample in rollouts.samples(config.log_samples)]
                samples.writelines(json.dumps(sample) + "\n" for sample in chosen)
                curve.write(json.dumps(line, allow_nan=False) + "\n")
                samples.flush()
                curve.flush()
                trackers.add(iteration, line)
                view.show(line, chosen)
                self.progress.iteration = iteration + 1
                if (iteration + 1) % config.save_every == 0 and iteration + 1 < config.iterations:
                    self.save_checkpoint()
        if config.keep is Keep.best:
            log.info(
                "ppo: keeping the policy of iteration %s, the best on validation prompts", self.progress.best_iteration
            )
            assert self.progress.best_iteration is not None
            wait_for_all()
            self.load_policy(self.checkpoints.best(self.progress.best_iteration))

    def step(self, iteration: int) -> tuple[dict[str, Any], Rollouts]:
        """One iteration: rollouts, rewards, advantages, updates. Returns its line of the training curve."""
        config = self.config
        started = time.perf_counter()
        self.seconds = {}
        with sharding.gathered(self.policy.model), plain_attention(self.policy.model):
            rollouts = self.rollout(iteration)
            sampled = time.perf_counter()
            if iteration == 0:
                check_start(self, rollouts)
        mask = rollouts.batch.completion_mask
        penalty = KL[config.kl_estimator](rollouts.logps, rollouts.ref_logps)
        scores = self.reward_scores(rollouts.scores, mask.sum(dim=1), rollouts.ended)
        rewards = losses.shaped_rewards(scores, penalty, mask, self.progress.kl_coef)
        reward = float(rewards.sum(dim=1).mean())
        if config.whiten_rewards:
            rewards = losses.whiten(rewards, mask, shift_mean=False)
        advantages, returns = losses.gae(rewards, rollouts.values, mask, config.gamma, config.gae_lambda)
        if config.whiten_advantages:
            advantages = losses.whiten(advantages, mask)
        with self.timed("update"), plain_attention(self.policy.model):
            statistics = self.update(iteration, rollouts, advantages, returns)
        sequence_kl = float((losses.kl_k1(rollouts.logps, rollouts.ref_logps) * mask).sum(dim=1).mean())
        line = {
            "method": "ppo",
            "iteration": iteration,
            "episodes": (iteration + 1) * config.rollouts,
            "score": float(rollouts.scores.mean()),
            "kl": sequence_kl,
            "reward": reward,
            # The mean of -log p over the policy's own samples estimates its entropy without bias.
            "entropy": float(losses.masked_mean(-rollouts.logps, mask)),
            "sampler_difference": float(losses.masked_mean((rollouts.sampled - rollouts.logps).abs(), mask)),
            "length": float(mask.sum(dim=1).mean()),
            "eos_rate": float(rollouts.ended.float().mean()),
            "kl_coef": self.progress.kl_coef,
            "value_mean": float(losses.masked_mean(rollouts.values, mask)),
            "explained_variance": float(losses.explained_variance(rollouts.values, returns, mask)),
            "seconds": round(time.perf_counter() - started, 3),
            "seconds_rollout": round(sampled - started, 3),
            **{f"seconds_{name}": round(value, 3) for name, value in self.seconds.items()},
            **statistics,
        }
        check_figures("ppo", f"iteration {iteration}", line)
        if config.kl_control is KLControl.adaptive:
            self.progress.kl_coef = losses.adaptive_kl_coef(
                self.progress.kl_coef, sequence_kl, config.kl_target, config.rollouts, config.kl_horizon
            )
        return line, rollouts

    def rollout(self, iteration: int) -> Rollouts:
        """Sample episodes, score them, and evaluate policy, value and reference on them once."""
        chosen, self.progress.position = self.stream.take(self.config.rollouts, self.progress.position)
        prompts, encoded = [prompt for prompt, _ in chosen], [ids for _, ids in chosen]
        with self.timed("sampling"):
            generations = self.actor.sample(
                encoded, [(self.seed, STREAM_ROLLOUT, iteration, row, 1) for row in range(len(encoded))]
            )
        examples = self.actor.examples(prompts, generations)
        with self.timed("scoring"):
            scores = torch.tensor(self.relative_scores(prompts, encoded, examples), device=self.device)
        first = self.progress.score_mean is None
        if first:
            self.start_from(scores)
        batch = self.actor.pack(encoded, generations)
        with self.timed("policy"):
            # The PM's head takes the value head's place only now, after the sampler has used that.
            noted = None if first and self.pm_head is not None else generations
            logps, values = self.actor.evaluate(batch, noted)
        with self.timed("reference"):
            ref_logps = self.actor.evaluate_reference(batch)
        ended = torch.tensor([generation.ended for generation in generations], device=self.device)
        sampled = self.actor.sampled(batch, generations)
        texts = [example.completion for example in examples]
        return Rollouts(prompts, texts, batch, ended, scores, logps, sampled, ref_logps, values)

    def relative_scores(
        self, prompts: Sequence[Prompt], encoded: Sequence[list[int]], examples: Sequence[Example]
    ) -> list[float]:
        """Scores of completions; with ``relative_reward`` minus that of the reference's completion on the prompt."""
        if not self.config.relative_reward:
            return [float(value) for value in self.score(examples)]
        known = self.progress.baselines
        new = {p.prompt_id: (p, ids) for p, ids in zip(prompts, encoded, strict=True) if p.prompt_id not in known}
        baselines: list[Example] = []
        if new:
            generations = self.actor.sample_reference(
                [ids for _, ids in new.values()],
                [(self.seed, STREAM_BASELINE, zlib.crc32(name.encode()), 0, 1) for name in new],
            )
            baselines = self.actor.examples([prompt for prompt, _ in new.values()], generations)
        # Scored together: where a score is missing, the mean of the others takes its place, and there are others.
        found = [float(value) for value in self.score([*examples, *baselines])]
        scores = found[: len(prompts)]
        known |= dict(zip(new, found[len(prompts) :], strict=True))
        return [score - known[prompt.prompt_id] for prompt, score in zip(prompts, scores, strict=True)]

    def start_from(self, scores: Tensor) -> None:
        """Take from the first scores what is kept: their mean and deviation, and with them the PM's head as value.

        The first iteration's completions come from the reference policy, whatever is trained.
        """
        mean, deviation = 0.0, 1.0
        if self.config.normalize_scores:
            mean, deviation = float(scores.mean()), float(scores.std(unbiased=False))
            if deviation <= 1e-6 * max(1.0, abs(mean)):
                log.warning("ppo: the first round's scores are all %.4g, so scores are not scaled, only shifted", mean)
                deviation = 1.0
        self.progress.score_mean, self.progress.score_std = mean, deviation
        if self.pm_head is not None:
            weight, bias = self.pm_head
            with torch.no_grad():
                self.value_head.linear.weight.copy_(weight / deviation)
                self.value_head.linear.bias.copy_((bias - mean) / deviation)

    def reward_scores(self, scores: Tensor, lengths: Tensor, ended: Tensor) -> Tensor:
        """Scores as they enter the reward: standardised by the reference's, clipped, minus penalties: (B,)."""
        config, state = self.config, self.progress
        assert state.score_mean is not None
        assert state.score_std is not None
        scores = (scores - state.score_mean) / state.score_std
        scores = scores.clamp(-config.score_clip, config.score_clip)
        return scores - config.missing_eos_penalty * (~ended).float() - config.length_penalty * lengths

    def update(self, iteration: int, rollouts: Rollouts, advantages: Tensor, returns: Tensor) -> dict[str, float]:
        """Minibatch epochs over the rollouts. Returns means over all minibatches, and the number of steps made."""
        config = self.config
        decay = 1 - iteration / config.iterations if config.linear_decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * decay
        train_policy = iteration >= config.warmup_iterations
        seen: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            order = np.random.default_rng([self.seed, STREAM_MINIBATCHES, iteration, epoch, 1]).permutation(
                len(rollouts.batch)
            )
            for rows in torch.from_numpy(order).to(self.device).split(config.minibatch_size):
                seen.append(self.minibatch(rows, rollouts, advantages, returns, train_policy))
                if self.too_far(seen[-1]):
                    break
            if self.too_far(seen[-1]):
                break
        steps = len(seen) - self.too_far(seen[-1])
        return {name: sum(one[name] for one in seen) / len(seen) for name in seen[0]} | {"updates": float(steps)}

    def too_far(self, statistics: dict[str, float]) -> bool:
        """Whether ``stop_kl`` ends the iteration's updates at this minibatch."""
        return self.config.stop_kl is not None and statistics["approx_kl"] > self.config.stop_kl

    def minibatch(
        self, rows: Tensor, rollouts: Rollouts, advantages: Tensor, returns: Tensor, train_policy: bool
    ) -> dict[str, float]:
        """One optimiser step on some episodes, in micro-batches whose gradients add up, as do those of processes."""
        config = self.config
        total = rollouts.batch.completion_mask[rows].sum()
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio_mean")
        sums = torch.zeros(len(names), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for part in self.actor.micro_batches(rollouts.batch, rows):
            batch = rollouts.batch.select(part)
            width = batch.tokens.shape[1]
            mask, old_logps = batch.completion_mask, rollouts.logps[part, :width]
            with self.recomputing():
                logps, values, entropies = self.actor.forward(batch, with_entropy=config.entropy_coef > 0)
            policy_loss, clipped = losses.ppo_policy_loss(
                logps, old_logps, advantages[part, :width], mask, config.clip_range
            )
            # Sums over the minibatch's tokens, so that micro-batches do not change the gradient.
            policy_term = policy_loss.sum() / total
            loss = policy_term - config.entropy_coef * entropies.sum() / total
            if self.value_adapter is None:
                value_term = self.value_loss(values, part, rollouts, returns) / total
                (config.value_coef * value_term + (loss if train_policy else 0)).backward()
            else:
                if train_policy:
                    loss.backward()
                # The backward pass is inside too: gradients reach, and layers are run again under, what is active.
                with self.value_adapter.active():
                    with self.recomputing():
                        values = self.actor.own_values(batch)
                    value_term = self.value_loss(values, part, rollouts, returns) / total
                    (config.value_coef * value_term).backward()
            with torch.no_grad():
                log_ratio = (logps - old_logps) * mask
                approx_kl = (log_ratio.expm1() - log_ratio).sum() / total
                ratio = (log_ratio.exp() * mask).sum() / total
                sums += torch.stack([policy_term, value_term, clipped.sum() / total, approx_kl, ratio])
        trained = [*self.parameters, *self.value_parameters]
        # FSDP has added up those of weights that it has spread.
        add_up([sums, *(value.grad for value in trained if value.grad is not None and not sharding.is_spread(value))])
        statistics = dict(zip(names, sums.tolist(), strict=True))
        if not train_policy:
            for parameter in self.parameters:
                parameter.grad = None
        # Apart: a value loss of another size must not decide how far the policy moves.
        statistics["grad_norm"] = sharding.clip_gradients(self.parameters, config.max_grad_norm)
        statistics["value_grad_norm"] = sharding.clip_gradients(self.value_parameters, config.max_grad_norm)
        if not self.too_far(statistics):
            self.optimizer.step()
        return statistics

    def value_loss(self, values: Tensor, rows: Tensor, rollouts: Rollouts, returns: Tensor) -> Tensor:
        """The clipped loss of some episodes' values (B, T), summed over their tokens."""
        width = values.shape[1]
        loss = losses.ppo_value_loss(
            values, rollouts.values[rows, :width], returns[rows, :width], self.config.value_clip_range
        )
        return (loss * rollouts.batch.completion_mask[rows, :width]).sum()

    def recomputing(self) -> contextlib.AbstractContextManager[None]:
        """For forward passes of an update: whether layers run again in the backward pass."""
        return recomputing(self.actor.model) if self.config.gradient_checkpointing else contextlib.nullcontext()

    def measure(self, iteration: int) -> dict[str, float]:
        """The policy on validation prompts, under the same random numbers each time; keeps the best one's weights.

        ``validation_objective`` is what training maximises: the mean score as it enters the reward (standardised,
        clipped, minus penalties) minus ``kl_coef``, as configured, times the KL.
        """
        with sharding.gathered(self.policy.model), plain_attention(self.policy.model):
            found = self.validate()
        check_figures("ppo", f"iteration {iteration}", found)
        objective, best = found["validation_objective"], self.progress.best_objective
        if best is None or objective > best:
            self.progress.best_iteration, self.progress.best_objective = iteration, objective
            if self.config.keep is Keep.best:
                weights = self.weights()
                if is_main():
                    self.checkpoints.save_best(iteration, weights)
        return found

    def validate(self) -> dict[str, float]:
        """Sample, score and compare to the reference on validation prompts."""
        prompts = self.validation
        encoded = [encode_chat(self.policy.tokenizer, prompt.messages) for prompt in prompts]
        generations = self.actor.sample(
            encoded, [(self.seed, STREAM_EVALUATION, row, 0, 1) for row in range(len(encoded))]
        )
        batch = self.actor.pack(encoded, generations)
        mask = batch.completion_mask
        examples = self.actor.examples(prompts, generations)
        scores = torch.tensor(self.relative_scores(prompts, encoded, examples), device=self.device)
        ended = torch.tensor([generation.ended for generation in generations], device=self.device)
        logps, _ = self.actor.evaluate(batch, generations)
        kl = float((losses.kl_k1(logps, self.actor.evaluate_reference(batch)) * mask).sum(dim=1).mean())
        objective = float(self.reward_scores(scores, mask.sum(dim=1), ended).mean()) - self.config.kl_coef * kl
        return {
            "validation_score": float(scores.mean()),
            "validation_kl": kl,
            "validation_objective": objective,
        }

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to ``seconds``."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

    def weights(self) -> dict[str, Tensor]:
        """What training changes of the policy; if it is spread, in the main process alone."""
        return {name: sharding.whole(value.detach()) for name, value in self.policy.trainable()}

    def load_policy(self, weights: dict[str, Tensor]) -> None:
        """Put such weights back."""
        with torch.no_grad():
            for name, parameter in self.policy.trainable():
                parameter.copy_(sharding.spread_like(weights[name], parameter))

    def save_checkpoint(self) -> None:
        """Write everything that the next iteration depends on."""
        tensors = {
            "policy": self.weights(),
            "value_head": self.value_head.state_dict(),
            "value_adapter": {} if self.value_adapter is None else self.value_adapter.weights(),
            "optimizer": sharding.optimizer_state(self.optimizer),
        }
        if is_main():
            self.checkpoints.save(self.progress, tensors)

    def load_checkpoint(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = self.checkpoints.newest()
        if found is None:
            return
        self.progress, tensors = found
        self.load_policy(tensors["policy"])
        self.value_head.load_state_dict(tensors["value_head"])
        if self.value_adapter is not None:
            self.value_adapter.load(tensors["value_adapter"])
        sharding.load_optimizer_state(self.optimizer, tensors["optimizer"])
