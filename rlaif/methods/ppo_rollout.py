"""PPO's episodes: which prompts come next, sampling completions, and evaluating policy, value and reference on them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlaif import losses
from rlaif.chat import encode_chat
from rlaif.config import PPOConfig
from rlaif.generation import STREAM_PROMPTS, Generation, generate, head_inputs
from rlaif.methods.ppo_sampler import VLLMSampler
from rlaif.methods.ppo_value import ValueAdapter, ValueHead
from rlaif.models import arithmetic, autocasts, eos_ids
from rlaif.policy import Packed, Policy, completion_logits, completion_states, has_plain_head, merged, pack
from rlaif.prefix import shareable
from rlaif.processes import add_up, share_of, spread, spreads_weights, world_size
from rlaif.records import Example, Prompt, UserError
from rlaif.trunk import with_trunk

log = logging.getLogger("rlaif")

_WITHOUT_GRADIENTS = 4
"""Times as many completions fit into a pass that is not followed by a backward pass."""

ScoreFunction = Callable[[Sequence[Example]], Sequence[float]]
"""Scores of completions; higher is better."""


@dataclass
class Rollouts:
    """A batch of episodes. Tensors are (B, T) over completion tokens; ``ended`` and ``scores`` are (B,)."""

    prompts: list[Prompt]
    texts: list[str]
    batch: Packed
    ended: Tensor
    scores: Tensor
    logps: Tensor
    sampled: Tensor
    """Log-probabilities that the tokens were drawn with, as the sampler noted them."""
    ref_logps: Tensor
    values: Tensor

    def samples(self, count: int) -> Iterator[dict[str, Any]]:
        """The first completions for samples.jsonl. JSON escapes whatever a model may have written."""
        mask = self.batch.completion_mask
        kl = (losses.kl_k1(self.logps, self.ref_logps) * mask).sum(dim=1)
        for row in range(min(count, len(self.texts))):
            yield {
                "prompt_id": self.prompts[row].prompt_id,
                "prompt": list(self.prompts[row].messages),
                "completion": self.texts[row],
                "score": float(self.scores[row]),
                "kl": float(kl[row]),
                "tokens": int(mask[row].sum()),
                "finish_reason": "stop" if self.ended[row] else "length",
            }


class PromptStream:
    """Training prompts in a new order each time around, encoded when their turn comes.

    Raises:
        UserError: if no prompt has at most ``limit`` tokens.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any, limit: int, seed: int) -> None:
        self.prompts, self.tokenizer, self.limit, self.seed = prompts, tokenizer, limit, seed
        self.order: tuple[int, Any] = (-1, None)
        self.too_long: set[int] = set()
        if all(self.encode(index) is None for index in range(len(prompts))):
            raise UserError(f"ppo.max_prompt_length={limit}: no prompt is that short")

    def take(self, count: int, position: int) -> tuple[list[tuple[Prompt, list[int]]], int]:
        """``count`` prompts and their token ids from ``position`` on, and the position after them."""
        taken: list[tuple[Prompt, list[int]]] = []
        while len(taken) < count:
            index = self.index(position)
            position += 1
            ids = self.encode(index)
            if ids is not None:
                taken.append((self.prompts[index], ids))
        return taken, position

    def index(self, position: int) -> int:
        """Which prompt stands at a position of the stream."""
        turn, place = divmod(position, len(self.prompts))
        if self.order[0] != turn:
            generator = np.random.default_rng([self.seed, STREAM_PROMPTS, turn, 0, 1])
            self.order = turn, generator.permutation(len(self.prompts))
        return int(self.order[1][place])

    def encode(self, index: int) -> list[int] | None:
        """Token ids of a prompt, None if it is too long."""
        if index in self.too_long:
            return None
        ids = encode_chat(self.tokenizer, self.prompts[index].messages)
        if len(ids) <= self.limit:
            return ids
        if not self.too_long:
            log.warning(
                "ppo: prompts of more than ppo.max_prompt_length=%d tokens are left out (the first: %s, %d tokens)",
                self.limit,
                self.prompts[index].prompt_id,
                len(ids),
            )
        self.too_long.add(index)
        return None


class Actor:
    """The policy with its value head, and the reference: they sample, and they evaluate samples.

    Several processes share the rows of each call, and all get all results.
    """

    def __init__(
        self,
        policy: Policy,
        config: PPOConfig,
        sampler: VLLMSampler | None = None,
        preference_model: Path | None = None,
    ) -> None:
        self.policy, self.config, self.sampler = policy, config, sampler
        self.model, self.tokenizer = policy.model, policy.tokenizer
        self.device = next(self.model.parameters()).device
        self.pad, self.eos = self.tokenizer.pad_token_id, eos_ids(self.model, self.tokenizer)
        self.value_head = ValueHead(self.model.config.get_text_config().hidden_size).to(self.device)
        self.value_adapter = ValueAdapter(policy, preference_model) if config.value_adapter else None
        self.dtype, self.autocast = arithmetic(policy.start), autocasts(policy.start, config.tuning)
        self.plain_head = has_plain_head(self.model)
        # Layers that are recomputed would write into the cache twice, and FSDP frees weights between two passes.
        self.share = not (config.gradient_checkpointing or spreads_weights()) and shareable(self.model)

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[Generation]:
        """A completion of each prompt by the policy."""
        if self.sampler is not None:
            return self.sampler.sample(prompts, seeds)
        with merged(self.model) as sampler:
            return self._generate(sampler, prompts, seeds)

    def sample_reference(self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]) -> list[Generation]:
        """A completion of each prompt by the reference."""
        if self.sampler is not None and self.policy.frozen is None:
            return self.sampler.sample(prompts, seeds, reference=True)
        with self.policy.reference() as reference:
            return self._generate(reference, prompts, seeds)

    def _generate(
        self, model: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]]
    ) -> list[Generation]:
        def work(order: Sequence[int]) -> list[Generation]:
            found: list[Generation] = []
            for start in range(0, len(order), self.config.rollout_batch_size):
                rows = order[start : start + self.config.rollout_batch_size]
                found += generate(
                    model,
                    [prompts[row] for row in rows],
                    [seeds[row] for row in rows],
                    max_new_tokens=self.config.max_new_tokens,
                    temperature=self.config.temperature,
                    eos=self.eos,
                    pad=self.pad,
                    observe=self.value_head if self.value_adapter is None else None,
                    training=True,
                )
            return found

        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        found = dict(zip(order, spread(work, order), strict=True))
        return [found[index] for index in range(len(prompts))]

    def examples(self, prompts: Sequence[Prompt], generations: Sequence[Generation]) -> list[Example]:
        """Completions of prompts as text, to be scored."""
        return [
            Example(prompt.messages, self.tokenizer.decode(row.tokens, skip_special_tokens=True).strip(), row.ended)
            for prompt, row in zip(prompts, generations, strict=True)
        ]

    def pack(self, prompts: Sequence[Sequence[int]], generations: Sequence[Generation]) -> Packed:
        """Prompts and completions as a batch that has passed through the layers that do not train."""
        batch = pack(prompts, [row.tokens for row in generations], self.pad, self.device, self.share)
        if len(batch) < world_size():
            return batch  # A process without a row would not know the trunk's shape.
        batch = with_trunk(self.model, batch, self.micro_batches(batch))
        add_up([] if batch.trunk is None else [batch.trunk])
        return batch

    def evaluate(self, batch: Packed, generations: Sequence[Generation] | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values of the current policy: two (B, T).

        Args:
            batch: the episodes.
            generations: what the sampler noted of them, taken instead of another forward pass where it says the
                same: in float32, merged weights give the figures of the training forward pass. vLLM's are never taken.
        """
        if generations is not None and self.sampler is None and self.dtype == torch.float32:
            logps = self.sampled(batch, generations)
            if self.value_adapter is not None:
                return logps, self.evaluate_values(batch)
            return logps, self._noted([row.values or [] for row in generations], batch)
        logps, values = (torch.zeros(batch.tokens.shape, device=self.device) for _ in range(2))
        with torch.no_grad():
            for rows in self.micro_batches(batch):
                part = batch.select(rows)
                width = part.tokens.shape[1]
                logps[rows, :width], values[rows, :width], _ = self.forward(part)
        add_up([logps, values])
        return logps, values if self.value_adapter is None else self.evaluate_values(batch)

    @torch.no_grad()
    def evaluate_values(self, batch: Packed) -> Tensor:
        """Values by an adapter of their own: (B, T)."""
        assert self.value_adapter is not None
        values = torch.zeros(batch.tokens.shape, device=self.device)
        with self.value_adapter.active():
            for rows in self.micro_batches(batch):
                part = batch.select(rows)
                values[rows, : part.tokens.shape[1]] = self.own_values(part)
        add_up([values])
        return values

    def sampled(self, batch: Packed, generations: Sequence[Generation]) -> Tensor:
        """Log-probabilities that the sampler drew the tokens with: (B, T)."""
        return self._noted([row.logps for row in generations], batch)

    def _noted(self, rows: Sequence[Sequence[float]], batch: Packed) -> Tensor:
        """Figures of each completion's tokens as (B, T), 0 after its end."""
        result = torch.zeros(batch.tokens.shape)
        for index, row in enumerate(rows):
            result[index, : len(row)] = torch.tensor(row)
        return result.to(self.device)

    @torch.no_grad()
    def evaluate_reference(self, batch: Packed) -> Tensor:
        """Log-probabilities of the reference: (B, T)."""
        logps = torch.zeros(batch.tokens.shape, device=self.device)
        with self.policy.reference() as reference:
            for rows in self.micro_batches(batch):
                part = batch.select(rows)
                logps[rows, : part.tokens.shape[1]] = self._token_logps(reference, part, False)[0]
        add_up([logps])
        return logps

    def forward(self, batch: Packed, with_entropy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities at the sampling temperature, values and entropies (zeros unless asked): (B, T) each.

        All are 0 after a completion's end; so are all values where these have an adapter of their own.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logps, entropies, states = self._token_logps(self.model, batch, with_entropy)
        if self.value_adapter is not None:
            return logps, torch.zeros_like(logps), entropies
        # Unless asked to, the value learns on the policy's features without pulling on them.
        values = self.value_head(states if self.config.value_backprop else states.detach())
        return logps, values * batch.completion_mask, entropies

    def own_values(self, batch: Packed) -> Tensor:
        """Values (B, T) by the adapter of their own, which must be active; 0 after a completion's end."""
        assert self.value_adapter is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            _, states, _ = self._states(self.model, self.value_adapter.fitting(batch))
        return self.value_head(states) * batch.completion_mask

    def _states(self, model: Any, batch: Packed) -> tuple[Tensor, Tensor, Any]:
        """What logits are made of, the last hidden states (both (B, T, ...)), and what makes logits of the former."""
        if self.plain_head:
            states = completion_states(model, batch)
            return states, states, model.get_output_embeddings()
        with head_inputs(model) as caught:
            logits = completion_logits(model, batch)
            return logits, caught()[:, -batch.tokens.shape[1] - 1 : -1], nn.Identity()

    def _token_logps(self, model: Any, batch: Packed, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities and entropies (B, T), and the states (B, T, H) that they were read from."""
        inputs, states, head = self._states(model, batch)
        real = batch.completion_mask.bool()
        found = losses.state_logps(inputs[real], head, batch.tokens[real], self.config.temperature, with_entropy)
        logps, entropies = (torch.zeros_like(batch.completion_mask).masked_scatter(real, each) for each in found)
        return logps, entropies, states

    def micro_batches(self, batch: Packed, rows: Tensor | None = None) -> list[Tensor]:
        """This process's share of some rows in micro-batches of similar length.

        By default of all rows, for passes that keep nothing for gradients: those take more at a time.
        """
        lengths = batch.mask.sum(dim=1)
        size = self.config.micro_batch_size * (_WITHOUT_GRADIENTS if rows is None else 1)
        rows = lengths.argsort(stable=True) if rows is None else rows[lengths[rows].argsort(stable=True)]
        return [part for part in share_of(rows).split(size) if len(part)]
