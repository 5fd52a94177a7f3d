"""PPO's checkpoints: complete or absent, and everything that a run needs to go on with the same numbers.

Random numbers are a function of seed, iteration and episode, so no generator's state is among it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif.folders import sync
from rlaif.records import read_json, write_json


@dataclass
class Progress:
    """What a checkpoint holds besides tensors."""

    iteration: int = 0
    kl_coef: float = 0.0
    position: int = 0
    """Prompts of the stream that have been drawn or left out."""
    score_mean: float | None = None
    score_std: float | None = None
    baselines: dict[str, float] = field(default_factory=dict)
    """Scores of the reference's completions by prompt id (``ppo.relative_reward``)."""
    best_iteration: int | None = None
    best_objective: float | None = None


class Checkpoints:
    """The folder ``checkpoints`` of a run."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkpoints"

    def save(self, progress: Progress, tensors: dict[str, Any]) -> None:
        """Write a checkpoint, then drop older ones."""
        final = self.root / f"iteration-{progress.iteration:06d}"
        temporary = self.root / f".{final.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(tensors, temporary / "state.pt")
        write_json(temporary / "progress.json", vars(progress))
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for other in self.root.glob("iteration-*"):
            if other != final:
                shutil.rmtree(other)
        for other in self.root.glob("best-*.pt"):
            if progress.best_iteration is None or other != self._best(progress.best_iteration):
                other.unlink()

    def newest(self) -> tuple[Progress, dict[str, Any]] | None:
        """The newest checkpoint, if there is one; its tensors on the CPU."""
        found = sorted(self.root.glob("iteration-*"))
        if not found:
            return None
        tensors = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
        return Progress(**read_json(found[-1] / "progress.json")), tensors

    def save_best(self, iteration: int, policy: dict[str, Tensor]) -> None:
        """Keep the trained weights of the best policy so far, that after ``iteration``.

        The one that the newest checkpoint knows of stays beside it: a run that goes on from there may still need it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        torch.save(policy, self.root / ".best.pt.partial")
        os.replace(self.root / ".best.pt.partial", self._best(iteration))

    def best(self, iteration: int) -> dict[str, Tensor]:
        """What ``save_best`` kept, on the CPU."""
        return torch.load(self._best(iteration), map_location="cpu", weights_only=True)

    def _best(self, iteration: int) -> Path:
        return self.root / f"best-{iteration:06d}.pt"

    def remove(self) -> None:
        """Drop what only an interrupted run needs."""
        shutil.rmtree(self.root, ignore_errors=True)
