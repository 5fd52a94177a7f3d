"""LoRA layers that pass over what they put out once instead of three times.

PEFT computes W x + (B A x) s as three tensors of the layer's width. Scaled where it is thin, and added by the product
itself, there is one: the same numbers up to rounding, in less time and memory, forward and backward.

Beside weights of 16 bits PEFT keeps A and B in float32, and computes with them in float32. Here they are rounded for
the product alone, as autocast does: what trains, its gradients and the optimiser stay float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def lean(model: Any) -> Any:
    """Give the model's LoRA layers this forward pass, which leaves whatever is not plain LoRA to PEFT; returns it."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)
    return model


def _forward(layer: Any, usual: Callable[..., Tensor], x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    """W x + B (s A x)."""
    if arguments or settings or not _is_plain(layer, x):
        return usual(x, *arguments, **settings)
    (name,) = layer.active_adapters
    first, second = (part[name].weight.to(x.dtype) for part in (layer.lora_A, layer.lora_B))
    thin = F.linear(x, first) * layer.scaling[name]
    result: Tensor = layer.base_layer(x)
    rows = torch.addmm(result.flatten(0, -2), thin.flatten(0, -2), second.t())
    return rows.view_as(result)


def _is_plain(layer: Any, x: Tensor) -> bool:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or torch.is_autocast_enabled(x.device.type):
        return False
    first, second, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(first) is not nn.Linear or type(second) is not nn.Linear:
        return False  # FSDP may have spread them by themselves.
    same = x.dtype == layer.base_layer.weight.dtype and first.weight.dtype in (x.dtype, torch.float32)
    return same and second.bias is None and (isinstance(dropout, nn.Identity) or not dropout.training)
