"""``python -m rlaif.report``: run folders -> report.html and report.md."""

from __future__ import annotations

import logging
from pathlib import Path

from rlaif.cli import launch
from rlaif.config import ReportConfig
from rlaif.records import existing_dir

log = logging.getLogger("rlaif")

USAGE = """
Compare runs: tables, plots, sample completions, each figure with its n and 95 % interval.

  python -m rlaif.report output_dir=DIR [key=value ...]

  output_dir=DIR                  gets report.html and report.md; without runs=, everything below it is compared
  runs=[DIR1,DIR2]                folders to compare
  baseline=base                   name of the row that the others are compared with
  title="My comparison"           examples=10   seed=0 (which prompts are shown)
"""


def main(config: ReportConfig, output: Path) -> None:
    """Entry of the command."""
    from rlaif.reporting import write_report

    roots = [existing_dir(run, "runs") for run in config.runs] or [existing_dir(output, "output_dir")]
    for path in write_report(roots, output, config.title, config.baseline, config.examples, config.seed):
        log.info("report: %s", path)


if __name__ == "__main__":
    launch("report", main, USAGE)
