"""What PPO shows while it works: a few lines that are kept up to date in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.artifacts import duration
from rlaif.processes import is_main
from rlaif.progress import line_below, progress
from rlaif.text import visible

log = logging.getLogger("rlaif")

# Key in the curve, words, and how its value is shown.
_POLICY = (
    ("score", "score", "{:+.2f}"),
    ("reward", "reward", "{:+.2f}"),
    ("kl", "kl", "{:.2f}"),
    ("entropy", "entropy", "{:.2f}"),
)
_UPDATE = (
    ("clip_fraction", "clipped", "{:.1%}"),
    ("value_loss", "value loss", "{:.3g}"),
    ("length", "length", "{:.1f}"),
    ("eos_rate", "ended", "{:.0%}"),
)
_VALIDATION = (("validation_score", "score", "{:+.2f}"), ("validation_kl", "kl", "{:.2f}"))

_LINE_EVERY_S = 10
_SAMPLE_EVERY_S = 60
"""Where there is no terminal."""


class View:
    """Round k of n, time left, the curve's figures and a sample. Use as a context manager.

    Args:
        iterations: of the whole run.
        first: the round that this process begins with.
    """

    def __init__(self, iterations: int, first: int = 0) -> None:
        self._iterations, self._first = iterations, first
        self._started = time.monotonic()
        self._lined = self._sampled = float("-inf")
        self._terminal = is_main() and sys.stderr.isatty()
        self._validation = ""
        self._bar: Any = None
        self._lines: list[Any] = []
        if self._terminal:
            self._bar = progress(iterations, "ppo", "iteration", initial=first)
            self._lines = [line_below(place + 1) for place in range(4)]

    def __enter__(self) -> View:
        return self

    def __exit__(self, *error: object) -> None:
        # From below: closing a bar moves what is under it.
        for line in reversed(self._lines):
            line.close()
        if self._bar is not None:
            self._bar.close()

    def show(self, line: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """A round's line of the curve, and what was logged of its completions."""
        iteration = int(line["iteration"])
        if "validation_score" in line:
            self._validation = f"validation after {iteration + 1}: {figures(line, _VALIDATION)}"
        sample = shown(samples[iteration % len(samples)]) if samples else ""
        if self._terminal:
            texts = (figures(line, _POLICY), figures(line, _UPDATE), self._validation, sample)
            width = shutil.get_terminal_size().columns - 1
            for place, text in zip(self._lines, [text for text in texts if text], strict=False):
                place.set_description_str(cut(f"  {text}", width))
            self._bar.update()
            self._bar.refresh()
        elif is_main():
            self._log(iteration, figures(line, (*_POLICY, *_UPDATE)), sample)

    def _log(self, iteration: int, text: str, sample: str) -> None:
        now, done, last = time.monotonic(), iteration + 1, iteration + 1 == self._iterations
        if now - self._lined >= _LINE_EVERY_S or last:
            self._lined = now
            left = (self._iterations - done) * (now - self._started) / (done - self._first)
            log.info("ppo: %d of %d, %s left: %s", done, self._iterations, duration(left), text)
            if self._validation:
                log.info("ppo: %s", self._validation)
                self._validation = ""
        if sample and (now - self._sampled >= _SAMPLE_EVERY_S or last):
            self._sampled = now
            log.info("ppo: %s", cut(sample, 400))


def figures(line: Mapping[str, Any], wanted: Sequence[tuple[str, str, str]]) -> str:
    """Some of a line's figures in words."""
    return ", ".join(f"{words} {form.format(line[key])}" for key, words, form in wanted)


def shown(sample: Mapping[str, Any]) -> str:
    """A line of samples.jsonl as one line that moves no cursor: the prompt's last turn, the completion, its score."""
    asked, said = (" ".join(visible(text).split()) for text in (sample["prompt"][-1]["content"], sample["completion"]))
    return f"sample (score {sample['score']:+.2f}): {cut(asked, 60)} -> {said}"


def cut(text: str, width: int) -> str:
    """The beginning of a text that fits into so many columns."""
    from tqdm.utils import disp_len, disp_trim

    return text if disp_len(text) <= width else disp_trim(text, max(width - 1, 0)) + "…"
