"""Adapters that do something: a fresh one adds nothing to its model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def fill(
    parameters: Iterable[tuple[str, torch.Tensor]], scale: float = 0.1, names: Sequence[str] = ("lora_B", "embedding_A")
) -> None:
    """Random numbers, always the same, where a name has one of ``names``: the half of LoRA that starts at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in parameters:
            if any(part in name for part in names):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
