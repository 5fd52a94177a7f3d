"""The entries of the commands, driven in this process: what an input ends with, without a process for each."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from rlaif import cli
from rlaif.artifacts import run_stage
from rlaif.config import register


@dataclass(frozen=True)
class Ended:
    """How a command ended: ``reached`` is the stage that it would have begun with."""

    status: int
    errors: str
    reached: str | None = None

    @property
    def fault(self) -> str | None:
        """What is wrong with this end: a traceback, no line or several for a user's mistake; ``None`` if nothing is."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        if "Traceback (most recent call last)" in self.errors:
            return "traceback"
        if self.status not in (0, 2):
            return f"exit status {self.status}"
        if self.status == 2 and (len(lines) != 1 or self.errors.rstrip().splitlines()[-1] != lines[0]):
            return "not one line"
        return None


class _ReachedStage(BaseException):
    pass


def _reached(stage: str, *arguments: Any, **settings: Any) -> Any:
    raise _ReachedStage(stage)


def drive(
    command: str, arguments: Sequence[str], *, to_the_end: bool = False, task: Callable[..., None] | None = None
) -> Ended:
    """Run ``python -m rlaif.COMMAND ARGUMENTS`` up to its first stage, or ``to_the_end``."""
    module = importlib.import_module(f"rlaif.{command}")
    errors, reached = io.StringIO(), None
    before = dict(os.environ)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [f"rlaif.{command}", *arguments]))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if not to_the_end:
            for name, loaded in list(sys.modules.items()):
                if name.startswith("rlaif.") and getattr(loaded, "run_stage", None) is run_stage:
                    stack.enter_context(mock.patch.object(loaded, "run_stage", _reached))
        try:
            cli.launch(command, task or module.main, module.USAGE)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except _ReachedStage as end:
            status, reached = 0, str(end)
        except BaseException as error:
            return Ended(1, f"Traceback (most recent call last)\n{type(error).__name__}: {error}")
        finally:
            os.environ.clear()
            os.environ.update(before)
            logging.getLogger().handlers.clear()
    return Ended(status, errors.getvalue(), reached)


@contextlib.contextmanager
def composed_once() -> Iterator[set[str]]:
    """Composing the settings takes most of a command's start.

    Here what arguments have in common is composed once. Those in the set that is yielded are applied to a copy of it,
    by Hydra's own parser and rules.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    compose = Hydra.compose_config
    tried: set[str] = set()
    made: dict[Any, bytes] = {}

    def composed(self: Any, config_name: str, overrides: list[str], **settings: Any) -> Any:
        own = [override for override in overrides if override in tried]
        parsed = OverridesParser.create().parse_overrides(own)
        base = tuple(override for override in overrides if override not in own)
        if (config_name, base) not in made:
            # Several times as fast as a deep copy.
            made[config_name, base] = pickle.dumps(compose(self, config_name, list(base), **settings))
        config = pickle.loads(made[config_name, base])
        ConfigLoaderImpl._apply_overrides_to_config(parsed, config)
        return config

    known: set[str] = set()

    def register_once(command: str) -> None:
        if command not in known:
            register(command)
        known.add(command)

    with (
        mock.patch.object(Hydra, "compose_config", composed),
        mock.patch.object(Hydra, "get_mode", return_value=None),
        mock.patch.object(cli, "register", register_once),
    ):
        yield tried


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
