"""Training that diverged is refused before anything of it is published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from rlaif.processes import from_main
from rlaif.records import UserError


def check_figures(method: str, when: str, figures: Mapping[str, Any]) -> None:
    """Refuse figures of a step that are not finite.

    Raises:
        UserError: naming them.
    """
    bad = [name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise UserError(f"{method}: {when} gave {', '.join(bad)} that is not finite; {_advice(method)}")


def check_weights(method: str, model: Any) -> None:
    """Refuse trained weights that no model can compute with: what the last step made of them, no figure has seen.

    That is where the sum of squares of a tensor is not finite in single precision. They must be whole in the main
    process.

    Raises:
        UserError: in every process, saying how many.
    """

    def check() -> None:
        trained = [value for value in model.parameters() if value.requires_grad]
        bad = sum(not bool(torch.isfinite(torch.linalg.vector_norm(value.detach().float()))) for value in trained)
        if bad:
            raise UserError(
                f"{method}: training left {bad} of {len(trained)} tensors with weights that are not finite, or too "
                f"large to compute with; {_advice(method)}"
            )

    from_main(check)


def _advice(method: str) -> str:
    return f"lower {method}.learning_rate, or set policy.dtype=float32"
