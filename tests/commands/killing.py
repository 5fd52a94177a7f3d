"""Kills at exact places: before the n-th call that changes the file system."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "sqlite3.connect"}


def kill_before(number: int, below: str) -> None:
    """Have this process killed before its ``number``-th change (from 0) of something whose path starts so."""
    count = 0

    def changes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) and _is_below(arguments[0])
        return event in _CHANGES and _is_below(arguments[0])

    def _is_below(path: Any) -> bool:
        # Within shutil.rmtree paths are relative to an open folder.
        return isinstance(path, (str, bytes, os.PathLike)) and (
            not os.path.isabs(path) or os.fsdecode(path).startswith(below)
        )

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if changes(event, arguments):
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def forked(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; returns its exit status, negative for a signal."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
