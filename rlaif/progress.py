"""Progress of long work, with a rate and, where ``total`` is known, an estimate of the time left."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

from rlaif.records import atomic_file


def progress(total: int | None, what: str, unit: str = "it", initial: int = 0, silent: bool = False) -> Any:
    """A tqdm bar on standard error: live in a terminal, one line every ten seconds in a log file."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        dynamic_ncols=terminal,
        ncols=None if terminal else 120,
        mininterval=0.2 if terminal else 10,
        ascii=not terminal,
        leave=None,  # A finished bar below another one would push that one down.
        disable=silent,
    )


def line_below(place: int) -> Any:
    """A line of text under a bar in a terminal; ``set_description_str`` puts words into it."""
    from tqdm import tqdm

    return tqdm(total=0, bar_format="{desc}", position=place, leave=False)


def keep_lines(file: Path, key: str, last: int) -> None:
    """Drop lines of a log that a checkpoint does not know of: from the first on whose ``key`` is above ``last``.

    A line that was cut, or is none of JSON, is not known either.
    """

    def known(line: str) -> bool:
        try:
            return line.endswith("\n") and int(json.loads(line)[key]) <= last
        except (ValueError, TypeError, KeyError):
            return False

    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if file.is_file() else []
    with atomic_file(file) as kept:
        kept.writelines(itertools.takewhile(known, lines))
