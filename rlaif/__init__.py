"""Align language models with AI feedback: label, train a preference model, run PPO, compare."""

import os
import sys
from types import TracebackType

__version__ = "0.1.0"


def _on_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


# ``python -m rlaif.COMMAND``: Ctrl-C while its modules load, before rlaif.cli can answer it.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _on_error
