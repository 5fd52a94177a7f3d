"""Checks before PPO's first update: what must hold exactly then, and silently goes wrong otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlaif.chat import encode_chat
from rlaif.config import ModelConfig, PPOConfig
from rlaif.generation import STREAM_CHECK
from rlaif.methods.ppo_sampler import SHAKE, shaken
from rlaif.models import adapter_base, context_length, is_adapter, load_causal_lm, load_tokenizer, resolve_model
from rlaif.policy import Packed, completion_logits, under
from rlaif.preference_model import AdapterPreferenceModel
from rlaif.processes import from_main
from rlaif.records import Prompt, UserError

if TYPE_CHECKING:
    from rlaif.methods.ppo import PPOTrainer
    from rlaif.methods.ppo_rollout import Rollouts

log = logging.getLogger("rlaif")

_ROWS = 4


def check_lengths(config: PPOConfig, start: ModelConfig, validation: Sequence[Prompt]) -> None:
    """Prompts and completions fit into the model, and a validation prompt is short enough: seen before any training.

    Raises:
        UserError: naming the setting.
    """
    context, asked = context_length(start), config.max_prompt_length + config.max_new_tokens
    if context is not None and asked > context:
        raise UserError(
            f"ppo.max_prompt_length={config.max_prompt_length} and ppo.max_new_tokens={config.max_new_tokens} make "
            f"{asked} tokens, and policy.name={start.name} takes {context}; lower one of them"
        )
    if not config.eval_every:
        return
    tokenizer = load_tokenizer(start)
    if not any(_fits(prompt, tokenizer, config) for prompt in validation):
        raise UserError(
            f"ppo.eval_every={config.eval_every}: none of {len(validation)} validation prompts has at most "
            f"ppo.max_prompt_length={config.max_prompt_length} tokens; raise that, or give ppo.eval_every=0"
        )


def validation_prompts(prompts: Sequence[Prompt], tokenizer: Any, config: PPOConfig) -> list[Prompt]:
    """The first ``eval_prompts`` of at most ``max_prompt_length`` tokens; says how many were left out on the way."""
    kept: list[Prompt] = []
    dropped = 0
    for prompt in prompts if config.eval_every else ():
        if len(kept) == config.eval_prompts:
            break
        if _fits(prompt, tokenizer, config):
            kept.append(prompt)
        else:
            dropped += 1
    if dropped:
        log.warning(
            "ppo: %d of %d validation prompts have more than ppo.max_prompt_length=%d tokens and are left out",
            dropped,
            dropped + len(kept),
            config.max_prompt_length,
        )
    return kept


def _fits(prompt: Prompt, tokenizer: Any, config: PPOConfig) -> bool:
    return len(encode_chat(tokenizer, prompt.messages)) <= config.max_prompt_length


class StartCheckError(UserError):
    """A property that must hold before the first update does not."""


@dataclass(frozen=True)
class Tolerance:
    """Differences in log-probability that rounding explains: their mean and their 95th percentile, in nats.

    Not the largest one: bfloat16 logits of a size near 20 are 0.125 apart, so a single log-probability may be off by
    far more than the mean, while a real fault moves most of them. (SmolLM2-135M in bfloat16 on a CPU, batches of
    another size: mean 0.05, 95th percentile 0.11; the mildest of the planted faults, a temperature of 0.9 instead of
    1: 0.20 and 0.58.)
    """

    mean: float
    most: float


def tolerance(dtype: torch.dtype) -> Tolerance:
    """What the precision allows."""
    return Tolerance(1e-4, 1e-3) if dtype == torch.float32 else Tolerance(0.1, 0.3)


def check_start(trainer: PPOTrainer, rollouts: Rollouts) -> None:
    """Before the first update: KL is 0, the ratio is 1, values are the head's start, padding does not matter.

    And the sampler drew its tokens from the policy, which only float32 takes for granted.

    If the starting policy came as an adapter, which is merged before training, the reference must also be what the
    adapter says on its base.

    Raises:
        StartCheckError: naming the property and by how much it fails.
    """
    actor, batch = trainer.actor, rollouts.batch
    limit = tolerance(actor.dtype)
    mask = batch.completion_mask
    check_close("KL to the reference", rollouts.logps - rollouts.ref_logps, mask, limit)
    rows = torch.arange(min(_ROWS, len(batch)), device=actor.device)
    part = batch.select(rows)
    width, few = part.tokens.shape[1], part.completion_mask
    again, _ = actor.evaluate(part)
    check_close("log of the probability ratio", again - rollouts.logps[rows, :width], few, limit)
    sampled = rollouts.sampled[rows, :width]
    check_close("the sampler's log-probabilities minus the policy's", sampled - again, few, limit)
    alone = unpadded_logps(trainer, rollouts, rows)
    check_close("effect of packing on log-probabilities", again - alone, few, limit)
    padded, _ = actor.evaluate(more_padding(part.whole(), actor.pad))
    check_close("effect of padding on log-probabilities", padded - alone, few, limit)
    if trainer.pm_head is None:
        check_close("value", rollouts.values, mask, Tolerance(1e-6, 1e-6))
    else:
        expected = pm_values(trainer, rollouts, rows)
        check_close("value minus the PM's", rollouts.values[rows, :width] - expected, few, limit)
    merged = bool(trainer.policy.start.adapter) or is_adapter(resolve_model(trainer.policy.start.name))
    if merged:
        expected = from_main(lambda: unmerged_logps(trainer, part)).to(actor.device)
        check_close("reference minus the starting policy", rollouts.ref_logps[rows, :width] - expected, few, limit)
    log.info(
        "ppo: start checks passed (KL 0, ratio 1, sampler as the policy, value %s, padding invariant%s)",
        "0" if trainer.pm_head is None else "the PM's",
        ", reference as its adapter says" if merged else "",
    )


def check_sampler_follows(trainer: PPOTrainer) -> None:
    """A sampler outside this process has the policy's weights, and follows when they move.

    At the start an adapter changes nothing, so that one which never arrived would not be seen. So a few completions are
    sampled under weights that are shaken for this check alone, and a few under the policy's own after that.

    Raises:
        StartCheckError: if they are not the completions of a policy with those weights.
    """
    actor, limit = trainer.actor, tolerance(trainer.actor.dtype)
    taken, _ = trainer.stream.take(_ROWS, 0)
    prompts = [ids for _, ids in taken]
    for moved in (True, False):
        seeds = [(trainer.seed, STREAM_CHECK, int(moved), row, 1) for row in range(_ROWS)]
        with shaken(trainer.policy, trainer.seed, SHAKE if moved else 0.0):
            generations = actor.sample(prompts, seeds)
            batch = actor.pack(prompts, generations)
            logps, _ = actor.evaluate(batch)
        with shaken(trainer.policy, trainer.seed, 0.0 if moved else SHAKE):
            others, _ = actor.evaluate(actor.pack(prompts, generations))
        mask, sampled = batch.completion_mask.bool(), actor.sampled(batch, generations)
        near, far = (float((sampled - each)[mask].abs().mean()) for each in (logps, others))
        # How much rounding grows under shaken weights depends on the model.
        if not (near < far / 2 and (moved or near <= limit.mean)):
            raise StartCheckError(
                "ppo.sampler=vllm: vLLM does not sample from the policy: the log-probabilities of its completions are "
                f"{near:.2g} nats per token from the policy's (rounding: up to {limit.mean}), and {far:.2g} from those "
                "under other weights; it serves another model, or does not take the weights over"
            )
    log.info("ppo: vLLM samples from the policy (%.2g nats per token apart)", near)


def check_close(what: str, difference: Tensor, mask: Tensor, limit: Tolerance) -> None:
    """Fail if differences on completion tokens are further from 0 than rounding explains."""
    found = difference[mask.bool()].abs().float()
    mean, most = float(found.mean()), float(found.quantile(0.95))
    if not (mean <= limit.mean and most <= limit.most):
        raise StartCheckError(
            f"before the first PPO update, {what} must be 0 (mean up to {limit.mean}, 95th percentile up to "
            f"{limit.most}), but its mean is {mean:.4g} and its 95th percentile {most:.4g}"
        )


def more_padding(batch: Packed, pad: int, columns: int = 3) -> Packed:
    """The same rows with more padding on the left."""

    def widen(tensor: Tensor, value: int) -> Any:
        return torch.cat([tensor.new_full((len(tensor), columns), value), tensor], dim=1)

    return Packed(
        ids=widen(batch.ids, pad),
        mask=widen(batch.mask, 0),
        positions=widen(batch.positions, 0),
        tokens=batch.tokens,
        completion_mask=batch.completion_mask,
    )


@torch.no_grad()
def unpadded_logps(trainer: PPOTrainer, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """Log-probabilities (B, T) of the policy, each row read alone, as token ids without padding, mask or positions.

    The prompt is encoded anew: nothing that packing makes is taken over but the completion's tokens.
    """
    actor, batch = trainer.actor, rollouts.batch.select(rows)
    logps = torch.zeros(batch.tokens.shape, device=actor.device)
    for place, row in enumerate(rows.tolist()):
        tokens = batch.tokens[place][batch.completion_mask[place].bool()]
        prompt = torch.tensor(encode_chat(actor.tokenizer, rollouts.prompts[row].messages), device=actor.device)
        with torch.autocast(actor.device.type, torch.bfloat16, enabled=actor.autocast):
            logits = actor.model(input_ids=torch.cat([prompt, tokens]).unsqueeze(0), use_cache=False).logits
        scaled = logits[0, len(prompt) - 1 : -1].float() / actor.config.temperature
        logps[place, : len(tokens)] = torch.log_softmax(scaled, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return logps


@torch.no_grad()
def pm_values(trainer: PPOTrainer, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """What the PM's head, standardised like the scores, reads from the states that it must, one row at a time.

    They are the reference's, or the PM's own where the value function starts with its adapter.
    """
    assert trainer.pm_head is not None
    weight, bias = (tensor.to(trainer.device) for tensor in trainer.pm_head)
    mean, deviation = trainer.progress.score_mean or 0.0, trainer.progress.score_std or 1.0
    batch = rollouts.batch.select(rows).whole()
    width = batch.tokens.shape[1]
    values = torch.zeros(len(rows), width, device=trainer.device)
    own, policy = trainer.actor.value_adapter, trainer.policy
    as_pm = own is not None and own.from_pm
    with under(policy.model, AdapterPreferenceModel.ADAPTER) if as_pm else policy.reference() as reader:
        for place in range(len(rows)):
            ids = batch.ids[place][batch.mask[place].bool()].unsqueeze(0)
            length = int(batch.completion_mask[place].sum())
            states = reader(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            scores = states[0, -length - 1 : -1].float() @ weight.T + bias
            values[place, :length] = (scores.squeeze(-1) - mean) / deviation
    return values


@torch.no_grad()
def unmerged_logps(trainer: PPOTrainer, batch: Packed) -> Tensor:
    """Log-probabilities (B, T) of the starting policy with its adapters beside the base, loaded anew, on the CPU."""
    from peft import PeftModel

    start = trainer.policy.start
    path = resolve_model(start.name)
    adapters, base, revision = [], path, start.revision
    if is_adapter(path):
        adapters = [path]
        base, found = adapter_base(path)
        revision = found or revision
    model = load_causal_lm(replace(start, name=base, revision=revision, adapter=None, device="cpu"))
    for adapter in [*adapters, *([start.adapter] if start.adapter else [])]:
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()  # A second adapter was trained on the first one merged in.
        model = PeftModel.from_pretrained(model, adapter).eval()
    batch = batch.whole()
    whole = Packed(*(getattr(batch, name).cpu() for name in ("ids", "mask", "positions", "tokens", "completion_mask")))
    logits = completion_logits(model, whole, trainer.config.temperature).float()
    logps = torch.log_softmax(logits, dim=-1).gather(-1, whole.tokens.unsqueeze(-1)).squeeze(-1)
    return logps * whole.completion_mask
