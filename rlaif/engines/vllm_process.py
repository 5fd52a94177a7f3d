"""The process that holds vLLM (``vllm_worker.py``), seen from the outside: jobs go in, answers come out."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlaif.records import UserError

Job = dict[str, Any]

log = logging.getLogger("rlaif")

_WORKER = Path(__file__).with_name("vllm_worker.py")
_SHUTDOWN_S = 1.5


def check_installed(python: str | None, where: str, key: str) -> None:
    """See that there is a vLLM to run: here, or under the interpreter that the setting ``key`` names.

    Raises:
        UserError: if there is none.
    """
    if python is None and importlib.util.find_spec("vllm") is None:
        raise UserError(
            f"{where}: vLLM is not installed; run `make setup-vllm`, or name an interpreter that has it: {key}=PATH"
        )
    if python is not None and not Path(python).is_file():
        raise UserError(f"{key}={python}: no such file")


class VLLMProcess:
    """Starts when it is first needed.

    Args:
        arguments: of vLLM's engine.
        python: the interpreter that has vLLM; none: this one.
        where: begins the line that ends the run if vLLM dies.
        kept: what stays of the run then.

    Raises:
        UserError: if vLLM cannot start or ends early.
    """

    def __init__(self, arguments: Job, python: str | None, where: str, kept: str) -> None:
        self.arguments = arguments
        self.max_length = 0
        self.answers: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        """Answers as they come; ``None``: the process has ended."""
        self._python = python or sys.executable
        self._where, self._kept = where, kept
        self._process: subprocess.Popen[str] | None = None
        self._numbers = itertools.count()
        self._log: Any = None

    def submit(self, job: Job) -> int:
        """Take a job, which is handed on at the latest by :meth:`receive`; its answer carries the number returned."""
        number = next(self._numbers)
        self._send({"id": number, **job})
        return number

    def receive(self) -> Job:
        """The next answer. Jobs are handed on before waiting for it: a system call for each job would be slow."""
        if self.answers.empty():
            self._flush()
        answer = self.answers.get()
        if answer is None:
            raise self.died("ended early")
        return answer

    def ask(self, jobs: Sequence[Job]) -> list[Job]:
        """Answers to jobs, in their order. Nobody else may be waiting for answers."""
        self.start()
        places = {self.submit(job): place for place, job in enumerate(jobs)}
        found: list[Job] = [{}] * len(jobs)
        while places:
            answer = self.receive()
            if answer["id"] in places:
                found[places.pop(answer["id"])] = answer
        return found

    def start(self) -> None:
        """Start the process and wait until it is ready, unless it runs."""
        if self._process is not None:
            return
        log.info("starting vLLM for %s", self.arguments["model"])
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - read when it died
        self._process = subprocess.Popen(
            [self._python, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            # A group of its own: Ctrl-C is for this process, which then ends the whole group.
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()
        self._send(self.arguments)
        self._flush()
        ready = self.answers.get()
        if ready is None:
            raise self.died("could not start")
        self.max_length = ready["max_model_len"]
        log.info("vLLM %s is ready", ready["vllm"])

    def _send(self, message: Job) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
        except OSError:
            raise self.died("ended early") from None

    def _flush(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.flush()
        except OSError:
            raise self.died("ended early") from None

    def _read(self, stdout: Any) -> None:
        # Pipes are finite: were answers not taken off while jobs are written, both sides would wait for ever.
        with contextlib.suppress(ValueError, OSError):
            for line in stdout:
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def died(self, what: str) -> UserError:
        """What to raise when the process has ended, with the last errors that it wrote."""
        self.close()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read()[-20_000:].splitlines() if line.strip()]
        reasons = [line for line in lines if "Error" in line and "engine core" not in line.lower()] or lines
        shown = "; ".join(dict.fromkeys(reasons[-2:])) or "no message"
        return UserError(f"{self._where}: vLLM {what}: {shown[-600:]} ({self._kept})")

    def close(self) -> None:
        """End the process and everything that it started."""
        process = self._process
        if process is None:
            return
        self._process = None
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SHUTDOWN_S)
