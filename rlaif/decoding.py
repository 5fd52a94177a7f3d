"""Decoding with transformers without copying the cache: not as it grows, and not once for every group of heads.

transformers appends a step's keys and values to copies of all before them, and on CPUs repeats these for every query
head that shares them. With many rows this takes a third of a step; with long prompts, nearly all of it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlaif.attention import attending_by

_ROOM = 128
"""Tokens for which room is made at most; where more come, it is made anew."""


class RoomyLayer(DynamicLayer):
    """Keys and values (B, K, T, D) at the beginning of tensors with room for more.

    Args:
        layer: what it takes over from.
        room: tokens that are expected to come; more make it move to larger tensors.
    """

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.room = room
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write behind what is there; returns all."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            length = max(end, start + self.room)
            self.buffers = self._moved(self.keys, length), self._moved(self.values, length)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and the room."""
        if self.buffers is None:
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        self.buffers = self.buffers[0][indices], self.buffers[1][indices]
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    @staticmethod
    def _moved(states: Tensor, length: int) -> Tensor:
        moved = states.new_empty((*states.shape[:-2], length, states.shape[-1]))
        moved[:, :, : states.shape[-2]] = states
        return moved


def with_room(cache: Any, tokens: int) -> Any:
    """The cache, with room for some of so many tokens more wherever it is a plain transformers cache."""
    room = min(tokens, _ROOM)
    if isinstance(cache, DynamicCache):
        cache.layers = [
            RoomyLayer(layer, room) if type(layer) is DynamicLayer and layer.is_initialized else layer
            for layer in cache.layers
        ]
    return cache


def grouped_heads(model: Any) -> contextlib.AbstractContextManager[None]:
    """Within the block, steps of one token on a CPU read keys and values that several heads share where they are."""
    return attending_by(_attend, model)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As transformers' own, but heads (B, H, 1, D) that share keys (B, K, T, D) stand as queries below each other."""
    rows, heads, width, size = query.shape
    own = attention_mask is not None and attention_mask.shape[1] > 1  # a mask for each head
    if width > 1 or own or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    grouped = query.reshape(rows, key.shape[1], -1, size)
    output = F.scaled_dot_product_attention(
        grouped, key, value, attention_mask, settings.get("dropout", 0.0), scale=settings.get("scaling")
    )
    return output.reshape(rows, 1, heads, -1), None
