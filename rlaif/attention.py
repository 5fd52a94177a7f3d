"""Attention over short rows in training on a CPU: by plain products, several times as fast as torch's own.

torch's fused kernel never holds all scores, which pays where rows are long. Its backward pass on CPUs is slow on short
ones, most of all in bfloat16, and transformers repeats keys and values for every query head that shares them. Up to
some hundred tokens the scores are small: products over them, once for all heads that share keys, give the same
attention, and closer gradients in bfloat16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlaif.models import inner

LONGEST = 192
"""Keys up to which plain products were faster in both precisions; the fused kernel wins from about 250 on."""


def plain_attention(model: Any) -> contextlib.AbstractContextManager[None]:
    """Within the block, passes over several tokens of short rows on a CPU are products that hold all scores."""
    return attending_by(_attend, model)


@contextlib.contextmanager
def attending_by(function: Callable[..., tuple[Tensor, None]], model: Any) -> Iterator[None]:
    """Within the block, a function in place of transformers' ``sdpa``, if the model is on a CPU.

    The models' settings stay as they are: some build their masks by the name of their attention.
    """
    if inner(model).device.type != "cpu":
        yield
        return
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers' own: queries (B, H, T, D), keys and values (B, K, S, D) -> (B, T, H, D)."""
    width, length = query.shape[2], key.shape[2]
    unusual = is_unusual(settings)
    if attention_mask is None:
        causal = settings.get("is_causal")
        if width == length and (getattr(module, "is_causal", True) if causal is None else causal):
            attention_mask = torch.ones(1, 1, width, length, dtype=torch.bool, device=query.device).tril()
    elif attention_mask.requires_grad or attention_mask.shape[-2:] != (width, length):
        unusual = True
    if unusual or width == 1 or length > LONGEST or attention_mask is None or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    output: Tensor = _Attention.apply(*as_autocast(query, key, value), attention_mask, scale_of(query, settings))
    return output.transpose(1, 2).contiguous(), None


def is_unusual(settings: Mapping[str, Any]) -> bool:
    """Whether a model asks for more than products of queries, keys and values: a bias, a cache, dropout."""
    return any(settings.get(name) is not None for name in ("position_bias", "cache")) or bool(settings.get("dropout"))


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision of autocast, where it is in place."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(each.to(torch.get_autocast_dtype("cpu")) for each in tensors)


def scale_of(query: Tensor, settings: Mapping[str, Any]) -> float:
    """What scores are multiplied by."""
    return float(settings.get("scaling") or query.shape[-1] ** -0.5)


def weigh(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(Q K' scale + mask) V, and the softmax: products whose results are scores are float32.

    Heads that share keys stand as queries below each other.

    Args:
        queries: (B K, G T, D).
        keys: (B K, S, D), as are ``values``.
        mask: (B, H or 1, T, S), true for what is seen, or to be added to scores; (1, 1, T, S) for all.
        scale: of scores.
    """
    scores = torch.bmm(queries.float(), keys.float().transpose(1, 2)).mul_(scale)
    by_head = scores.view(len(mask), -1, *mask.shape[2:])
    if mask.dtype == torch.bool:
        # Not -inf: rows of padding see nothing, and must not become NaN.
        by_head.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    else:
        by_head.add_(mask)
    weights = torch.softmax(scores, -1, out=scores).to(queries.dtype)
    return torch.bmm(weights, values), weights


def weigh_back(
    gradient: Tensor, queries: Tensor, keys: Tensor, values: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values for one (B K, G T, D) of what :func:`weigh` gave."""
    of_values = torch.bmm(weights.transpose(1, 2), gradient)
    of_weights = torch.bmm(gradient.float(), values.float().transpose(1, 2))
    of_scores = torch._softmax_backward_data(of_weights, weights.float(), -1, torch.float32)
    of_scores = of_scores.mul_(scale).to(weights.dtype)
    return torch.bmm(of_scores, keys), torch.bmm(of_scores.transpose(1, 2), queries), of_values


class _Attention(torch.autograd.Function):
    """Attention by :func:`weigh`, whatever autocast is in place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            queries = query.reshape(-1, query.shape[1] // key.shape[1] * query.shape[2], query.shape[3])
            keys, values = (each.reshape(-1, *each.shape[2:]) for each in (key, value))
            output, weights = weigh(queries, keys, values, mask.expand(len(query), -1, -1, -1), scale)
        ctx.save_for_backward(queries, keys, values, weights)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return output.view(*query.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        queries, keys, values, weights = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            found = weigh_back(gradient.reshape(*queries.shape[:2], -1), queries, keys, values, weights, ctx.scale)
        query, key, value = (each.view(shape) for each, shape in zip(found, ctx.shapes, strict=True))
        return query, key, value, None, None
