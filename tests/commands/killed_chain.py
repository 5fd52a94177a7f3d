"""Run a command again and again, each time killed a little later, until it ends by itself.

Usage: ``killed_chain.py MOMENTS FOLDER COMMAND ARGUMENTS...``, where MOMENTS is a number n (before the first change of
a file below FOLDER, then before the n-th after it, and so on) or ``random``. Prints how often it was killed.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import runpy
import signal
import sys
import threading
import time

from killing import forked, kill_before


def run(moments: str, number: int, folder: str, command: str, arguments: list[str]) -> None:
    """Run the command as ``python -m rlaif.COMMAND`` does, and have it killed."""
    if moments == "random":
        # Later and later, or a busy machine would never come to an end.
        seconds = random.Random(number).uniform(0, 0.3 * (number + 1))
        threading.Thread(target=kill_later, args=(seconds,), daemon=True).start()
    else:
        kill_before(number * int(moments), folder)
    sys.argv = [command, *arguments]
    runpy.run_module(f"rlaif.{command}", run_name="__main__", alter_sys=True)


def kill_later(seconds: float) -> None:
    """Kill this process after a while."""
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    moments, folder, command, *arguments = sys.argv[1:]
    for number in itertools.count():
        status = forked(functools.partial(run, moments, number, folder, command, arguments))
        if status != -signal.SIGKILL:
            sys.stdout.write(f"{number}\n")
            sys.exit(status)
