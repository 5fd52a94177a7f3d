"""Sampling completions with a transformers model.

A plain decode loop: every sequence draws from its own stream of random numbers, so a completion does not depend
on which others share its batch, and finished sequences leave the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Generation:
    """Token ids of a completion (with its end token, if it ended) and whether it ended by itself."""

    tokens: list[int]
    ended: bool

    @property
    def finish_reason(self) -> str:
        """``stop`` or ``length``."""
        return "stop" if self.ended else "length"


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one left-padded tensor and its attention mask, both of shape (rows, longest)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """One token per row by inverting the cumulative distribution.

    Args:
        logits: (rows, vocabulary).
        uniform: (rows,) in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens with this mass.

    Returns:
        Token ids of shape (rows,).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # Keep a token if the mass before it is still below top_p: at least one stays.
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(dim=-1)
    point = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # Rounding may land one past the end.
    return drawn.clamp(max=probs.shape[-1] - 1)


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    eos: Sequence[int],
    pad: int,
) -> list[Generation]:
    """Sample one completion for each prompt.

    Args:
        model: a causal language model.
        prompts: token ids of each prompt.
        seeds: integers that seed each completion's own random numbers.
        max_new_tokens: cut completions after this many tokens.
        temperature: sampling temperature; 0 is greedy.
        top_p: nucleus mass.
        eos: token ids that end a completion.
        pad: token id to pad with.
    """
    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, pad, device)
    uniform = torch.from_numpy(
        np.stack([np.random.default_rng(list(seed)).random(max_new_tokens, np.float32) for seed in seeds])
    ).to(device)
    ends = torch.tensor(list(eos), device=device)
    tokens = torch.full((len(prompts), max_new_tokens), pad, dtype=torch.long, device=device)
    lengths = torch.full((len(prompts),), max_new_tokens, dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    active = torch.arange(len(prompts), device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        drawn = draw(output.logits[:, -1], uniform[active, step], temperature, top_p)
        tokens[active, step] = drawn
        done = torch.isin(drawn, ends)
        lengths[active[done]] = step + 1
        ended[active[done]] = True
        if bool(done.all()):
            break
        keep = ~done
        ids, mask, positions = drawn.unsqueeze(-1), mask, positions[:, -1:] + 1
        if bool(done.any()):
            rows = keep.nonzero().squeeze(-1)
            active, ids, mask, positions = active[rows], ids[rows], mask[rows], positions[rows]
            cache.batch_select_indices(rows)
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=-1)
    counts, flags = lengths.tolist(), ended.tolist()
    return [Generation(row[:count], flag) for row, count, flag in zip(tokens.tolist(), counts, flags, strict=True)]
