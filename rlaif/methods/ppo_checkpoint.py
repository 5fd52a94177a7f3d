"""PPO's checkpoints: complete or absent, and everything that a run needs to go on with the same numbers.

Random numbers are a function of seed, iteration and episode, so no generator's state is among it.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlaif.folders import sync
from rlaif.records import UserError, read_json, write_json

log = logging.getLogger("rlaif")


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

    @classmethod
    def read(cls, file: Path) -> Progress:
        """What was written, if it makes sense.

        Raises:
            ValueError: if it does not.
            UserError: if it is no JSON.
        """
        value = read_json(file)
        types = {each.name: _JSON_TYPES[str(each.type)] for each in fields(cls)}
        if not isinstance(value, dict) or not all(type(v) in types.get(name, ()) for name, v in value.items()):
            raise ValueError(f"{file.name} does not hold what was written")
        found = cls(**value)
        if found.iteration < 1 or found.position < 0 or not math.isfinite(found.kl_coef):
            raise ValueError(f"{file.name} does not hold what was written")
        return found


_NONE = type(None)
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, _NONE),
    "int | None": (int, _NONE),
    "dict[str, float]": (dict,),
}
_UNREADABLE = (FileNotFoundError, UserError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError)
"""What reading a checkpoint raises that is not whole: PyTorch has no error of its own for it."""
_TENSORS = ("policy", "value_head", "value_adapter", "optimizer")


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
        """The newest checkpoint that is whole, if there is one; its tensors on the CPU."""
        for folder in sorted(self.root.glob("iteration-*"), reverse=True):
            try:
                progress = Progress.read(folder / "progress.json")
                tensors = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
                if not isinstance(tensors, dict) or not tensors.keys() >= set(_TENSORS):
                    raise ValueError("state.pt does not hold what was written")
                if progress.best_iteration is not None and not self._best(progress.best_iteration).is_file():
                    raise ValueError(f"{self._best(progress.best_iteration).name} is missing")
            except _UNREADABLE as error:
                why = (str(error) or type(error).__name__).splitlines()[0][:200]
                log.warning("WARNING: ppo: checkpoint %s cannot be used (%s); its rounds are made again", folder, why)
            else:
                return progress, tensors
        return None

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
