"""Commands and scripts in processes forked from one that has imported the libraries, which takes most of their time.

Apart from that they are what ``python -m rlaif.COMMAND`` or ``python SCRIPT.py`` is: a process of its own, with its own
standard error.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
TIMEOUT = 300
LIBRARIES = [
    *("datasets", "hydra", "matplotlib.pyplot", "pandas", "peft", "torch", "transformers"),
    *(f"rlaif.methods.{name}" for name in ("dpo", "online", "pm", "ppo", "sft")),
    "rlaif.engines.hf",
    "rlaif.labeling.audit",
    "rlaif.reporting",
]


class Preloaded:
    """Runs commands, and scripts by their path.

    ``env`` is the environment of all of them, and of the libraries while they are imported.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES)

    def start(self, command: str, arguments: list[str], cwd: Path, **own: str) -> Started:
        """Start one, with ``own`` in its environment too."""
        folder = tempfile.TemporaryDirectory()
        out, err = (Path(folder.name) / name for name in ("out", "err"))
        process = self._context.Process(target=_run, args=(command, arguments, cwd, self.env | own, out, err))
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self.env)
        try:
            process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return Started(process, [command, *arguments], folder)

    def run(self, command: str, arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run one to its end.

        Raises:
            subprocess.TimeoutExpired: if it takes longer than ``timeout`` seconds.
        """
        return self.start(command, arguments, cwd).ended(timeout)

    def run_group(
        self, command: str, arguments: list[str], environments: Sequence[Mapping[str, str]]
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run one in each of these environments at the same time; they meet at a port of their own.

        Raises:
            subprocess.TimeoutExpired: if one takes longer than ``TIMEOUT`` seconds.
        """
        port = str(_free_port())
        started = [self.start(command, arguments, REPO, **{**own, "MASTER_PORT": port}) for own in environments]
        return [process.ended(TIMEOUT) for process in started]


@dataclass
class Started:
    """A process that runs."""

    process: Any
    arguments: list[str]
    folder: tempfile.TemporaryDirectory[str]

    def ended(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait for its end.

        Raises:
            subprocess.TimeoutExpired: if that takes longer than ``timeout`` seconds.
        """
        with self.folder as folder:
            self.process.join(timeout)
            if self.process.exitcode is None:
                self.process.kill()
                self.process.join()
                raise subprocess.TimeoutExpired(self.arguments, timeout)
            files = (Path(folder) / name for name in ("out", "err"))
            texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *texts)


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_script(preloaded: Preloaded | None, script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a script in a preloaded process, or in one from scratch: what compares two runs has one of each."""
    if preloaded is not None:
        return preloaded.run(str(script), arguments, REPO, TIMEOUT)
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env, timeout=TIMEOUT, check=False)


def _run(command: str, arguments: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [command, *arguments]
    try:
        if command.endswith(".py"):
            runpy.run_path(command, run_name="__main__")
        else:
            runpy.run_module(f"rlaif.{command}", run_name="__main__", alter_sys=True)
    finally:
        # Processes of multiprocessing leave without it.
        atexit._run_exitfuncs()
