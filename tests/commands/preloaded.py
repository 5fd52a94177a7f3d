"""Commands in processes forked from one that has imported the libraries, which takes most of a short command's time.

Apart from that they are what ``python -m rlaif.COMMAND`` is: a process of its own, with its own standard error.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = [
    *("datasets", "hydra", "matplotlib.pyplot", "pandas", "peft", "torch", "transformers"),
    *(f"rlaif.methods.{name}" for name in ("dpo", "online", "pm", "ppo", "sft")),
    "rlaif.engines.hf",
    "rlaif.labeling.audit",
    "rlaif.reporting",
]


class Preloaded:
    """Runs commands; ``env`` is the environment of all of them, and of the libraries while they are imported."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES)

    def run(self, command: str, arguments: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run one to its end.

        Raises:
            subprocess.TimeoutExpired: if it takes longer than ``timeout`` seconds.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            process = self._context.Process(target=_run, args=(command, arguments, cwd, self.env, out, err))
            before = dict(os.environ)
            os.environ.clear()
            os.environ.update(self.env)
            try:
                process.start()
            finally:
                os.environ.clear()
                os.environ.update(before)
            process.join(timeout)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(command, timeout)
            texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in (out, err)]
        return subprocess.CompletedProcess([command, *arguments], process.exitcode, *texts)


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
        runpy.run_module(f"rlaif.{command}", run_name="__main__", alter_sys=True)
    finally:
        # Processes of multiprocessing leave without it.
        atexit._run_exitfuncs()
