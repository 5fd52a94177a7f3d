"""Numbers as text, and other people's text made harmless.

Model output, names and errors are hostile: they may hold markup, control characters or characters that
reorder the line. Only text of type :class:`Safe` is made here; all other text is escaped for where it goes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlaif.reporting.collect import Estimate, Record
from rlaif.text import visible

SIMULATED = "programmatic annotator, not people"
MISSING = "–"
_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "@": "&#64;"} | {c: f"\\{c}" for c in "\\`*{}[]()#+!~$"}
)


class Safe(str):
    """Text made by this package from numbers and fixed words: needs no Markdown escaping."""

    __slots__ = ()


def markdown(text: str) -> str:
    """``text`` as one line of Markdown that shows it literally: no link, image, heading or HTML."""
    if isinstance(text, Safe):
        return text
    escaped = visible(text).replace("\t", " ").translate(_MARKDOWN)
    escaped = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", escaped)
    # Bare addresses and emoji codes: ``https\://x`` and ``www\.x`` are no links.
    escaped = re.sub(r":(?=\S)", r"\\:", escaped)
    escaped = re.sub(r"(?i)\b(www)\.", r"\1\\.", escaped)
    return escaped.replace("\n", "<br>")


def number(value: float | None, decimals: int | None = None) -> Safe:
    """A number with as many decimals as its size asks for."""
    if value is None:
        return Safe(MISSING)
    digits = _decimals(value) if decimals is None else decimals
    return Safe(f"{round(value, digits) + 0.0:.{digits}f}")


def _decimals(value: float) -> int:
    return 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0


def estimate_text(estimate: Estimate | None) -> Safe:
    """``0.41 [0.36, 0.46] (n=128)``; what was not recorded is said to be so."""
    if estimate is None:
        return Safe(MISSING)
    low, high = estimate.low, estimate.high
    bounds = [x for x in (low, high) if x is not None]
    decimals = _decimals(max([estimate.value, *bounds], key=abs))
    if len(bounds) == 2 and decimals == 2 and bounds[1] - bounds[0] < 0.02:
        decimals = 3
    # A bound that is not zero must not read as zero: verdicts hang on it.
    while decimals < 5 and any(x != 0 and round(x, decimals) == 0 for x in bounds):
        decimals += 1
    interval = ", ".join(number(x, decimals) for x in bounds) if len(bounds) == 2 else "no interval"
    count = "n not recorded" if estimate.n is None else f"n={estimate.n}"
    return Safe(f"{number(estimate.value, decimals)} [{interval}] ({count})")


def seeds_text(values: Sequence[float]) -> Safe:
    """``0.41 (2 seeds, 0.38 to 0.44)``: the mean over seeds with the range of the seeds."""
    if not values:
        return Safe(MISSING)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Safe(f"{number(mean)} (1 seed)")
    return Safe(f"{number(mean)} ({len(values)} seeds, {number(min(values))} to {number(max(values))})")


def feedback_text(feedback: str | None) -> str:
    """Where a row's preferences came from, in words; simulated people are never called people."""
    known = {
        None: MISSING,
        "ai": "AI",
        "human": "human",
        "simulated_human": f"simulated_human, {SIMULATED}",
        "style_order": "style order, a control without labels",
        "shuffled": "shuffled AI labels, a control",
    }
    return Safe(known[feedback]) if feedback in known else str(feedback)


def origin_text(record: Record) -> str:
    """:func:`feedback_text` of a record, and whether that is the user's word alone."""
    shown = feedback_text(record.text("feedback"))
    if record.values.get("feedback_declared") is not True:
        return shown
    note = " (declared by the user)"
    return Safe(shown + note) if isinstance(shown, Safe) else shown + note


def cut(text: str, limit: int) -> str:
    """``text`` on one line of at most ``limit`` characters."""
    line = " ".join(visible(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
