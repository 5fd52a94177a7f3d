"""LoRA layers that pass over what they put out once instead of three times, and back in one step.

PEFT computes W x + (B A x) s as three tensors of the layer's width. Scaled where it is thin, and added by the product
itself, there is one: the same numbers up to rounding, in less time and memory, forward and backward.

Beside weights of 16 bits PEFT keeps A and B in float32, and computes with them in float32. Here they are rounded for
the product alone, as autocast does: what trains, its gradients and the optimiser stay float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS, _WIDTH = range(513, 1700), range(512, 1025)
"""Rows, and columns of the result, between which oneDNN's bfloat16 products for AMX run on a single thread."""


def lean(model: Any) -> Any:
    """Give the model's LoRA layers this forward pass, which leaves whatever is not plain LoRA to PEFT; returns it."""
    from peft.tuners.lora import Linear

    for module in model.modules():
        if type(module) is Linear and "forward" not in vars(module):
            module.forward = partial(_forward, module, module.forward)
    return model


def _is_lean(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(layer: Any, usual: Callable[..., Tensor], x: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    """W x + B (s A x)."""
    if arguments or settings or not _is_plain(layer, x):
        return usual(x, *arguments, **settings)
    (name,) = layer.active_adapters
    base = layer.base_layer
    rounded = vars(layer).get("rounded", {})
    first, second = rounded.get(name) or (part[name].weight for part in (layer.lora_A, layer.lora_B))
    result: Tensor = _LoRA.apply(x, base.weight, base.bias, first, second, layer.scaling[name])
    return result


@contextlib.contextmanager
def rounded_once(model: Any) -> Iterator[None]:
    """Within the block A and B are rounded once, not every pass. For passes without gradients, between changes."""
    layers = [module for module in model.modules() if _is_lean(module) and len(module.active_adapters) == 1]
    try:
        for layer in layers:
            (name,), dtype = layer.active_adapters, layer.base_layer.weight.dtype
            if name in layer.lora_A and layer.lora_A[name].weight.dtype != dtype:
                parts = (part[name].weight.detach().to(dtype) for part in (layer.lora_A, layer.lora_B))
                layer.rounded = {name: tuple(parts)}
        yield
    finally:
        for layer in layers:
            vars(layer).pop("rounded", None)


class _LoRA(torch.autograd.Function):
    """W x + b + B (s A x) of x (..., I), W (O, I), A (R, I), B (O, R); W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
    ) -> Tensor:
        rows, short, wide = x.flatten(0, -2), first.to(x.dtype), second.to(x.dtype)
        thin = torch.mm(rows, short.t()).mul_(scale)
        result = product(rows, weight.t(), bias).addmm_(thin, wide.t())
        ctx.save_for_backward(rows, weight, short, wide, thin)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (first.dtype, second.dtype)
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        rows, weight, short, wide, thin = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_thin = torch.mm(gradient, wide).mul_(ctx.scale)
        of_x = of_first = of_second = None
        if ctx.needs_input_grad[0]:
            of_x = product(gradient, weight).addmm_(of_thin, short).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            of_first = torch.mm(of_thin.t(), rows).to(ctx.dtypes[0])
        if ctx.needs_input_grad[4]:
            of_second = torch.mm(gradient.t(), thin).to(ctx.dtypes[1])
        return of_x, None, None, of_first, of_second, None


def _is_plain(layer: Any, x: Tensor) -> bool:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or torch.is_autocast_enabled(x.device.type):
        return False
    base, first, second, dropout = (
        layer.base_layer,
        *(part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)),
    )
    if not all(map(_is_bare, (base, first, second))):
        return False
    same = x.dtype == base.weight.dtype and first.weight.dtype in (x.dtype, torch.float32)
    frozen = not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
    return same and frozen and second.bias is None and (isinstance(dropout, nn.Identity) or not dropout.training)


def _is_bare(module: nn.Module) -> bool:
    """Whether all that a call of the module does is to multiply: FSDP or others may have wrapped it by itself."""
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (N, I) times weight (I, O), plus bias (O,): (N, O), without a gradient."""
    few = len(rows) not in _ROWS or weight.shape[1] not in _WIDTH
    if few or rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)
    result = rows.new_empty(len(rows), weight.shape[1])
    parts = -(-len(rows) // 512)
    for part, out in zip(rows.chunk(parts), result.chunk(parts), strict=True):
        torch.mm(part, weight, out=out)
    return result if bias is None else result.add_(bias)
