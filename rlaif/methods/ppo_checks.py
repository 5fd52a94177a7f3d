"""Checks before PPO's first update: what must hold exactly then, and silently goes wrong otherwise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from rlaif.policy import Packed

if TYPE_CHECKING:
    from rlaif.methods.ppo import PPOTrainer, Rollouts

log = logging.getLogger("rlaif")

_ROWS = 4


class StartCheckError(RuntimeError):
    """A property that must hold before the first update does not."""


def tolerance(dtype: torch.dtype) -> float:
    """Largest difference in log-probability that rounding explains."""
    return 1e-3 if dtype == torch.float32 else 0.25


def check_start(trainer: PPOTrainer, rollouts: Rollouts) -> None:
    """Before the first update: KL is 0, the ratio is 1, values are 0, padding does not matter.

    Raises:
        StartCheckError: naming the property and by how much it fails.
    """
    dtype = torch.bfloat16 if trainer.autocast else next(trainer.model.parameters()).dtype
    limit = tolerance(dtype)
    mask = rollouts.batch.completion_mask
    check_close("KL to the reference", (rollouts.logps - rollouts.ref_logps) * mask, limit)
    check_close("value", rollouts.values * mask, limit)
    rows = torch.arange(min(_ROWS, len(rollouts.batch)), device=trainer.device)
    part = rollouts.batch.select(rows)
    width = part.tokens.shape[1]
    again = trainer.evaluate_policy(part)[0]
    check_close("log of the probability ratio", again - rollouts.logps[rows, :width], limit)
    padded = trainer.evaluate_policy(more_padding(part, trainer.pad))[0]
    check_close("effect of padding on log-probabilities", padded - again, limit)
    log.info("ppo: start checks passed (KL 0, ratio 1, value 0, padding invariant)")


def check_close(what: str, difference: torch.Tensor, limit: float) -> None:
    """Fail if any entry is further from 0 than ``limit``."""
    worst = float(difference.abs().max())
    if not worst <= limit:
        raise StartCheckError(f"before the first PPO update, {what} must be 0 (up to {limit}), but is {worst:.4g}")


def more_padding(batch: Packed, pad: int, columns: int = 3) -> Packed:
    """The same rows with more padding on the left."""

    def widen(tensor: torch.Tensor, value: int) -> Any:
        return torch.cat([tensor.new_full((len(tensor), columns), value), tensor], dim=1)

    return Packed(
        ids=widen(batch.ids, pad),
        mask=widen(batch.mask, 0),
        positions=widen(batch.positions, 0),
        tokens=batch.tokens,
        completion_mask=batch.completion_mask,
    )
