"""Tokens that every row of a batch begins with pass through the model once, not once a row.

Prompts share a system message, and questions to a labeler its instructions. vLLM keeps such prefixes in its cache;
here the same is done for passes with transformers, those with gradients included: the keys and values of the prefix
are computed for one row and stand before those of every row, so all gradients meet in that row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlaif.models import inner

_SHORTEST = 8
"""A second pass over fewer tokens costs more than it saves."""

_SHAREABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def split_prefix(rows: Sequence[Sequence[int]]) -> tuple[list[int], list[Sequence[int]]]:
    """The tokens that all rows begin with (none if they are few), and what follows in each: at least one token."""
    length = shared_length(rows) if len(rows) > 1 else 0
    if length < _SHORTEST:
        length = 0
    return list(rows[0][:length]) if length else [], [row[length:] for row in rows]


def shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; at least one of each is left over."""
    # What the first and the last in alphabetical order share, all share.
    first, last = min(map(list, rows)), max(map(list, rows))
    length, limit = 0, min(map(len, rows)) - 1
    while length < limit and first[length] == last[length]:
        length += 1
    return length


def positions_after(prefix: Tensor | None, mask: Tensor) -> Tensor:
    """Position of each column of left-padded rows (B, T), counted from the start of the prefix."""
    return (mask.cumsum(-1) - 1).clamp(min=0) + (0 if prefix is None else len(prefix))


def read_after(
    model: Any,
    prefix: Tensor | None,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    run: Callable[..., Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Arguments of a forward pass over rows that stand after a prefix, which is read now.

    Args:
        model: the model that the rows pass through.
        prefix: (L,) token ids before every row, or None.
        ids: (B, T).
        mask: (B, T), or (B, 1, T, T) for what each token sees, of these columns alone.
        positions: (B, T), counted from the start of the prefix.
        run: what to call instead of the model itself: a part of it.
        settings: further arguments of that call.
    """
    rows = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    if prefix is None:
        return rows
    cache = read_prefix(model, prefix, len(ids), run, **settings)
    return rows | {
        "attention_mask": torch.cat([mask.new_ones((*mask.shape[:-1], len(prefix))), mask], dim=-1),
        "past_key_values": cache,
        "use_cache": True,
    }


def read_prefix(model: Any, prefix: Tensor, rows: int, run: Callable[..., Any] | None = None, **settings: Any) -> Any:
    """Keys and values of a prefix in every layer that was run, as a cache for so many rows."""
    from transformers import DynamicCache

    cache = DynamicCache(config=getattr(model, "module", model).config.get_text_config())
    (run or model)(input_ids=prefix.unsqueeze(0), past_key_values=cache, use_cache=True, **settings)
    # Not copied: the rows see the same numbers.
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = (each.expand(rows, -1, -1, -1) for each in (layer.keys, layer.values))
        else:
            # Not run, because its output is known (rlaif.trunk); but any layer may be asked how long the cache is.
            nothing = torch.zeros((rows, 1, len(prefix), 1), device=prefix.device)
            layer.lazy_initialization(nothing, nothing)
            layer.keys = layer.values = nothing
    return cache


def shareable(model: Any) -> bool:
    """Whether rows after a shared prefix get the states that they get as whole rows.

    Not where attention ends at some distance: it counts columns, and between prefix and row there may be padding.
    Whether the model takes a cache as it should is tried, once a model.
    """
    core = inner(model)
    if core not in _SHAREABLE:
        config = core.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        near = any(kind != "full_attention" for kind in kinds) if kinds else getattr(config, "sliding_window", None)
        _SHAREABLE[core] = not near and _same_states(core)
    return _SHAREABLE[core]


@torch.no_grad()
def _same_states(model: Any) -> bool:
    backbone, device = model.base_model, next(model.parameters()).device
    tokens = torch.arange(1, 9, device=device).expand(2, -1)
    mask = torch.ones_like(tokens)
    mask[1, 4:6] = 0
    positions = mask.cumsum(-1) - 1
    real = mask[:, 4:].bool()

    def whole() -> Tensor:
        states = backbone(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        return states[:, 4:][real]

    def split() -> Tensor:
        after = read_after(model, tokens[0, :4], tokens[:, 4:], mask[:, 4:], positions[:, 4:], backbone)
        return backbone(**after)[0][real]

    return agree(whole, split)


def agree(states: Callable[[], Tensor], others: Callable[[], Tensor]) -> bool:
    """Whether two ways through a model give the same states, up to rounding; not if it does not take one of them."""
    try:
        one, other = states(), others()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # no such cache, mask or arguments
    exact = one.dtype == torch.float32 and not torch.is_autocast_enabled(one.device.type)
    one, other = one.float(), other.float()
    return bool((one - other).abs().mean() <= (1e-3 if exact else 0.05) * one.abs().mean())
