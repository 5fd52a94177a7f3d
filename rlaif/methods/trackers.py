"""Training curves in trackers: TensorBoard beside ``training.jsonl``, and others that are asked for by name.

A run that goes on from a checkpoint works some steps again; TensorBoard is told to forget those that it has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    is_tensorboard_available,
)

from rlaif.processes import is_main
from rlaif.records import UserError

TENSORBOARD = "tensorboard"
"""Name of the tracker, and of the folder with its files."""


def chosen(report_to: Sequence[str] | None) -> list[str]:
    """Names of the trackers behind a setting: null is TensorBoard where it is installed."""
    if report_to is None:
        return [TENSORBOARD] if is_tensorboard_available() else []
    return list(report_to)


def check_trackers(report_to: Sequence[str] | None, method: str) -> None:
    """Trackers that were asked for by name must be known and installed.

    Raises:
        UserError: naming the setting and the tracker.
    """
    if method == "ppo":
        # It has a loop of its own, for which transformers' callbacks are not made; accelerate's trackers are.
        library, known, installed = "accelerate", set(LOGGER_TYPE_TO_CLASS), _installed()
    else:
        library, known = "transformers", set(INTEGRATION_TO_CALLBACK)
        installed = set(get_available_reporting_integrations())
    for tracker in sorted(set(report_to or ()) - {"all", "none"}):
        if tracker not in known:
            names = ", ".join(sorted(known))
            raise UserError(f"{method}.report_to: {library} knows no tracker {tracker!r}; it knows {names}")
        if tracker not in installed:
            raise UserError(f"{method}.report_to: {tracker} is not installed")


def _installed() -> set[str]:
    """Trackers of accelerate that can be used."""
    return {tracker.value for tracker in get_available_trackers()}


class TensorBoardBeside(TensorBoardCallback):
    """transformers' TensorBoard curves in ``folder``, where they outlive the checkpoints."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.logging_dir = str(folder / TENSORBOARD)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the curves after the step that training goes on from."""
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **kwargs)


class Trackers:
    """Where PPO's curve is shown. Use as a context manager; only the main process reports.

    Args:
        report_to: the setting.
        folder: of the run.
        first: the first iteration that will be added; later ones that are known are forgotten.
        settings: of the run, for trackers that keep them.
    """

    def __init__(self, report_to: Sequence[str] | None, folder: Path, first: int, settings: Mapping[str, Any]) -> None:
        names = set(chosen(report_to)) - {"none"}
        if "all" in names:
            names = _installed()
        self._trackers: list[Any] = []
        for name in sorted(names) if is_main() else ():
            make = LOGGER_TYPE_TO_CLASS[name]
            if name == TENSORBOARD:
                tracker = make(TENSORBOARD, folder, purge_step=first)
                tracker.start()
            else:
                project = os.environ.get("WANDB_PROJECT", "rlaif")
                tracker = make(project, folder) if make.requires_logging_directory else make(project)
                tracker.start()
                tracker.store_init_configuration(flat(settings))
            self._trackers.append(tracker)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def add(self, iteration: int, line: Mapping[str, Any]) -> None:
        """One line of the curve."""
        values = {f"train/{key}": value for key, value in line.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.log(values, step=iteration)


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys; lists, which not every tracker takes, as text."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = str(value) if isinstance(value, list) else value
    return found
