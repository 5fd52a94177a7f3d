"""A million comparisons against ten thousand: memory, cost per label, and how fast a killed run goes on.

    python -m benchmarks.labeling_scale [--quick]

Both runs are ``python -m rlaif.label labeler=scripted`` on generated candidates, four to a prompt: six comparisons,
each in both orders. The large run is killed when nine tenths of its verdicts are stored, and then goes on; the small
one is measured before, between and after, for the machine's speed may drift while the large one lasts. ``rss_*`` is
the largest resident memory of the process. --quick takes a twentieth of both sizes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parser, say

PER_PROMPT = 6
VERDICTS = 2 * PER_PROMPT
SMALL, LARGE = 10_000, 1_000_000
CONSTITUTION = """\
name: short
version: "1"
description: One principle, so that a comparison takes two verdicts.
principles:
  - id: short
    question: Which reply is shorter?
"""


def write_candidates(file: Path, comparisons: int) -> int:
    """Prompts of four random completions; returns how many verdicts they take."""
    prompts = comparisons // PER_PROMPT
    rng = random.Random(0)
    words = [f"{chr(97 + first)}{chr(97 + second)}{number}" for first in range(26) for second in range(26)
             for number in range(10)]  # fmt: skip
    with file.open("w", encoding="utf-8") as lines:
        for number in range(prompts):
            completions = [" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(4)]
            split = "validation" if number % 10 == 0 else "train"
            line = {"prompt_id": f"p{number}", "prompt": " ".join(rng.choices(words, k=12)), "split": split}
            lines.write(json.dumps({**line, "completions": completions}) + "\n")
    return prompts * VERDICTS


class Run:
    """One ``rlaif.label`` process."""

    def __init__(self, candidates: Path, output: Path) -> None:
        self.store = output.with_name(f".{output.name}.partial") / "store.sqlite"
        self.quality = output / "quality.json"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.started = time.perf_counter()
        settings = {
            "candidates": candidates,
            "output_dir": output,
            "constitution": candidates.with_name("short.yaml"),
            "labeler": "scripted",
            "labeler.scripted.utility": "brevity",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlaif.label", *(f"{key}={value}" for key, value in settings.items())],
            stdout=self.log,
            stderr=self.log,
        )

    def wait_for(self, verdicts: int) -> None:
        """Until so many verdicts are stored."""
        while self.process.poll() is None:
            started = time.perf_counter()
            if self._stored() >= verdicts:
                break
            # Counting reads the whole table and holds back the write-ahead log: seldom.
            time.sleep(min(max(1.0, 50 * (time.perf_counter() - started)), 10.0))

    def _stored(self) -> int:
        try:
            with sqlite3.connect(f"file:{self.store}?mode=ro", uri=True) as connection:
                return int(connection.execute("SELECT COUNT(*) FROM verdicts").fetchone()[0])
        except sqlite3.Error:
            return 0

    def wait_for_news(self) -> float:
        """Seconds from the start until something new is stored."""
        connection = sqlite3.connect(f"file:{self.store}?mode=ro", uri=True)
        [before] = connection.execute("PRAGMA data_version").fetchone()
        while self.process.poll() is None and connection.execute("PRAGMA data_version").fetchone() == (before,):
            time.sleep(0.02)
        connection.close()
        return time.perf_counter() - self.started

    def end(self, kill: bool = False) -> tuple[float, float]:
        """Seconds from the start, and the largest resident memory in MiB."""
        if kill:
            self.process.send_signal(signal.SIGKILL)
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode and not kill:
            self.log.seek(0)
            sys.exit(f"rlaif.label failed:\n{self.log.read()[-2000:]}")
        return time.perf_counter() - self.started, usage.ru_maxrss / 1024


def main() -> None:
    """Run both sizes and print the ratios."""
    arguments = parser(__doc__).parse_args()
    scale = 20 if arguments.quick else 1
    details: dict[str, Any] = {"comparisons_small": SMALL // scale, "comparisons_large": LARGE // scale}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "short.yaml").write_text(CONSTITUTION, encoding="utf-8")
        small = write_candidates(folder / "small.jsonl", SMALL // scale)
        # What every run takes, whatever its size: imports, the configuration.
        write_candidates(folder / "none.jsonl", 100)
        few: list[tuple[float, float, float]] = []

        def measure_small() -> None:
            turn = len(few)
            fixed, _ = Run(folder / "none.jsonl", folder / f"none-{turn}").end()
            seconds, rss = Run(folder / "small.jsonl", folder / f"small-{turn}").end()
            say(f"{small} verdicts in {seconds:.1f} s, of which {fixed:.1f} s before the first; {rss:.0f} MiB")
            few.append((fixed, seconds, rss))

        measure_small()
        large = write_candidates(folder / "large.jsonl", LARGE // scale)
        run = Run(folder / "large.jsonl", folder / "large")
        run.wait_for(large * 9 // 10)
        seconds_killed, rss_killed = run.end(kill=True)
        say(f"killed at nine tenths of {large} verdicts, after {seconds_killed:.1f} s; {rss_killed:.0f} MiB")
        measure_small()
        run = Run(folder / "large.jsonl", folder / "large")
        resumed = run.wait_for_news()
        seconds_resumed, rss_resumed = run.end()
        say(f"went on after {resumed:.1f} s and ended after {seconds_resumed:.1f} s; {rss_resumed:.0f} MiB")
        measure_small()
        figures = json.loads((folder / "large" / "quality.json").read_text(encoding="utf-8"))
        if figures["n_verdicts"] != large or figures["failed"]:
            sys.exit(f"{figures['n_verdicts']} verdicts instead of {large}, {figures['failed']} failed")
    # The second start reads its way through what is stored; that is the price of the kill, not of a label.
    seconds_large = seconds_killed + seconds_resumed - resumed
    fixed, seconds_small, rss_small = (statistics.median(values) for values in zip(*few, strict=True))
    details |= {
        "seconds_fixed": round(fixed, 2),
        "seconds_small": round(seconds_small, 2),
        "seconds_large": round(seconds_large, 2),
        "rss_small_mib": round(rss_small),
        "rss_large_mib": round(max(rss_killed, rss_resumed)),
    }
    ratios = {
        "rss_ratio_1m_to_10k": round(max(rss_killed, rss_resumed) / rss_small, 3),
        "cost_per_label_ratio_1m_to_10k": round((seconds_large - fixed) / large / ((seconds_small - fixed) / small), 3),
        "seconds_to_go_on_at_nine_tenths": round(resumed, 2),
    }
    finish("labeling_scale", ratios, details, [], arguments.quick)


if __name__ == "__main__":
    main()
