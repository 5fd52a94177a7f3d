"""Decoder layers: those below the lowest adapter, which policy and reference share, and recomputation of the others.

With ``lora.top_layers`` below 1 nothing that trains comes before the adapted layers. Their input is computed once
per batch and kept; every later pass over the batch, of the policy or of the reference, starts from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlaif.prefix import read_after
from rlaif.processes import spreads_weights

if TYPE_CHECKING:
    from rlaif.policy import Packed


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


def frozen_layers(model: Any) -> list[nn.Module]:
    """The decoder layers, from the first on, below everything that trains; none if the model is not built so."""
    model = getattr(model, "module", model)  # inside a distributed wrapper
    layers = decoder_layers(model)
    if layers is None or any(value.requires_grad for value in model.get_input_embeddings().parameters()):
        return []
    for depth, layer in enumerate(layers):
        if any(value.requires_grad for value in layer.parameters()):
            return list(layers[:depth])
    return []


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """The model's decoder layers; None if it is not built of one list of them."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    return found[0] if len(found) == 1 else None


def with_trunk(model: Any, batch: Packed, parts: Sequence[Tensor]) -> Packed:
    """The batch with the output of the frozen layers, or as it is where there are none.

    Args:
        model: a causal language model.
        batch: rows to run.
        parts: their indices in micro-batches.
    """
    # FSDP gathers weights around whole passes through the layers.
    frozen = [] if spreads_weights() else frozen_layers(model)
    if not frozen:
        return batch
    trunk: Tensor | None = None
    before: Tensor | None = None
    for rows in parts:
        *prefix, output = _run(model, frozen[-1], batch.select(rows))
        if not isinstance(output, Tensor):
            return batch
        if trunk is None:
            trunk = output.new_zeros((*batch.ids.shape, output.shape[-1]))
            before = prefix[0] if prefix else None
        trunk[rows, batch.columns(rows)] = output
    return replace(batch, trunk=trunk, prefix_trunk=before, trunk_layers=len(frozen))


@torch.no_grad()
def _run(model: Any, last: nn.Module, batch: Packed) -> list[Any]:
    """What a layer puts out of the batch's prefix, if it has one, and of its rows."""
    caught: list[Any] = []

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        caught.append(output)
        raise _ReachedError

    def run(**arguments: Any) -> None:
        with contextlib.suppress(_ReachedError):
            model(**arguments)

    handle = last.register_forward_hook(stop)
    try:
        run(**read_after(model, batch.prefix, batch.ids, batch.mask, batch.positions, run))
    finally:
        handle.remove()
    return caught


@contextlib.contextmanager
def starting_at(model: Any, trunk: Tensor | None, depth: int) -> Iterator[None]:
    """Within the block, forward passes take ``trunk`` as the output of the first ``depth`` layers and run the others.

    Not of the layers that are frozen at the moment: with its adapters off, a model has none that trains.
    """
    layers = None if trunk is None else decoder_layers(getattr(model, "module", model))
    if layers is None:
        yield
        return

    def known(*arguments: Any, **settings: Any) -> Tensor | None:
        return trunk

    with _forwards([(layer, known) for layer in layers[:depth]]):
        yield


@contextlib.contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Within the block, forward passes keep only the input of each trained layer; backward runs the layer again.

    transformers' own gradient checkpointing works in training mode only. A policy whose rollouts and updates must
    agree stays in evaluation mode, without dropout.

    Raises:
        ValueError: if the model is not built of a list of decoder layers.
    """
    layers = decoder_layers(getattr(model, "module", model))
    if layers is None:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers to recompute")
    frozen = len(frozen_layers(model))
    with _forwards([(layer, partial(checkpoint, layer.forward, use_reentrant=False)) for layer in layers[frozen:]]):
        yield


@contextlib.contextmanager
def _forwards(replacements: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Other ``forward`` functions for some modules, for the length of the block."""
    before = [vars(module).get("forward") for module, _ in replacements]
    for module, forward in replacements:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), forward in zip(replacements, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
