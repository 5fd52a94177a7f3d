"""Sampling completions with a transformers model.

A plain decode loop: every sequence draws from its own stream of random numbers, so a completion does not depend
on which others share its batch, and finished sequences leave the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlaif.prefix import positions_after, read_prefix, shareable, split_prefix
from rlaif.records import UserError

# First words of random streams after the seed, so that no two purposes share numbers. NumPy pads short seeds with
# zeros, so all have the same length and end in 1.
STREAM_ROLLOUT, STREAM_EVALUATION, STREAM_PROMPTS, STREAM_MINIBATCHES, STREAM_BASELINE, STREAM_BEST_OF_N = range(1, 7)
STREAM_CHECK = 7


@dataclass(frozen=True)
class Generation:
    """A sampled completion.

    ``tokens`` includes the end token if it ended by itself. ``logps`` are the log-probabilities that the tokens
    were drawn with, at the sampling temperature (before nucleus cuts); ``values`` what ``observe`` made of the
    state before each token.
    """

    tokens: list[int]
    ended: bool
    logps: list[float]
    values: list[float] | None = None

    @property
    def finish_reason(self) -> str:
        """``stop`` or ``length``."""
        return "stop" if self.ended else "length"


_WORTH_KEEPING = 7 / 8
"""Rows that have ended are taken out of a batch once no more than this share of it is left."""


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one left-padded tensor and its attention mask, both of shape (rows, longest)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def left_pad_after(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device, share: bool
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """What all rows begin with, (L,) or None, and :func:`left_pad` of what follows; whole rows unless ``share``."""
    prefix, rest = split_prefix(rows) if share else ([], rows)
    return (torch.tensor(prefix, device=device) if prefix else None, *left_pad(rest, pad, device))


def draw(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inverting the cumulative distribution.

    Args:
        logits: (rows, vocabulary).
        uniform: (rows,) in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_p: keep the smallest set of tokens with this mass.

    Returns:
        Token ids, and their log-probabilities at the temperature (at 1 if that is 0) before the cut: each (rows,).
    """
    logits = logits.float()
    if temperature not in (0, 1):
        logits = logits / temperature
    logps = torch.log_softmax(logits, dim=-1)

    def drawn(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens, logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    if temperature == 0:
        return drawn(logits.argmax(dim=-1))
    probs = logps.exp()
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        # Keep a token if the mass before it is still below top_p: at least one stays.
        ordered[ordered.cumsum(dim=-1) - ordered >= top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    cumulative = probs.cumsum(dim=-1)
    point = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, point, right=True).squeeze(-1)
    # Rounding may land one past the end.
    return drawn(place.clamp(max=probs.shape[-1] - 1))


@contextlib.contextmanager
def head_inputs(model: Any) -> Iterator[Callable[[], torch.Tensor]]:
    """Catch the hidden states that enter the output head during a forward pass: (B, kept, H)."""
    caught: list[torch.Tensor] = []

    def hook(module: Any, arguments: tuple[Any, ...]) -> None:
        caught[:] = [arguments[0]]

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield lambda: caught[0]
    finally:
        handle.remove()


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
    observe: Callable[[torch.Tensor], torch.Tensor] | None = None,
    training: bool = False,
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
        observe: a value of the hidden states (B, 1, H) -> (B, 1) before each token, for example a value head.
        training: what is not finite is the training's to refuse, in all processes at once.

    Raises:
        UserError: if the model gives no probabilities, unless it is in training.
    """
    from rlaif.decoding import grouped_heads, with_room

    device = next(model.parameters()).device
    prefix, ids, mask = left_pad_after(prompts, pad, device, shareable(model))
    uniform = torch.from_numpy(
        np.stack([np.random.default_rng(list(seed)).random(max_new_tokens, np.float32) for seed in seeds])
    ).to(device)
    ends = torch.tensor(list(eos), dtype=torch.long, device=device)
    tokens = torch.full((len(prompts), max_new_tokens), pad, dtype=torch.long, device=device)
    logps = torch.zeros((len(prompts), max_new_tokens), device=device)
    values = torch.zeros_like(logps)
    lengths = torch.full((len(prompts),), max_new_tokens, dtype=torch.long, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    active = torch.arange(len(prompts), device=device)
    positions = positions_after(prefix, mask)
    cache = None
    if prefix is not None:
        cache = read_prefix(model, prefix, len(prompts), logits_to_keep=1)
        mask = torch.cat([mask.new_ones(len(mask), len(prefix)), mask], dim=1)
    with head_inputs(model) as hidden, grouped_heads(model):
        for step in range(max_new_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values if step else with_room(output.past_key_values, max_new_tokens)
            drawn, logps[active, step] = draw(output.logits[:, -1], uniform[active, step], temperature, top_p)
            tokens[active, step] = drawn
            if observe is not None:
                values[active, step] = observe(hidden()[:, -1:]).squeeze(-1)
            now = torch.isin(drawn, ends) & ~ended[active]
            lengths[active[now]] = step + 1
            ended[active[now]] = True
            left = (~ended[active]).nonzero().squeeze(-1)
            if not len(left):
                break
            # What has ended stays where it is: a model may have no position further on.
            ids, positions = drawn.unsqueeze(-1), positions[:, -1:] + (~ended[active]).long().unsqueeze(-1)
            # Taking rows out copies the cache: not for each that ends.
            if len(left) <= _WORTH_KEEPING * len(active):
                active, ids, mask, positions = active[left], ids[left], mask[left], positions[left]
                cache.batch_select_indices(left)
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=-1)
    if not training and logps.isnan().any():
        name = getattr(model.config, "name_or_path", "") or "the model"
        raise UserError(f"{name} gives NaN for what comes next: its weights are damaged, or its training diverged")
    rows = zip(tokens.tolist(), lengths.tolist(), ended.tolist(), logps.tolist(), values.tolist(), strict=True)
    return [
        Generation(row[:count], flag, logp[:count], value[:count] if observe is not None else None)
        for row, count, flag, logp, value in rows
    ]
