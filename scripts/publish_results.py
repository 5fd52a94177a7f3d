"""Write the demo's results into README.md (between its markers) and docs/results.md.

python -m rlaif.run experiment=demo_controls seed=0,1,2 output_dir=runs/demo_seeds -m
python scripts/publish_results.py runs/demo_seeds demo_controls
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlaif.records import UserError
from rlaif.reporting import write_report
from rlaif.reporting.collect import Collection, collect
from rlaif.reporting.statement import values
from rlaif.reporting.text import estimate_text, origin_text, seeds_text

ROOT = Path(__file__).parent.parent
BASELINE = "base"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
COLUMNS = {
    "gold_score": "gold score (VADER)",
    "gold_gain": "gain over base",
    "win_rate": "win rate",
    "kl": "KL (nats)",
    "length": "tokens",
    "eos_rate": "ended",
}


def readme_table(found: Collection) -> str:
    """One line per policy: its figures with their intervals, or of several seeds the mean and range."""
    lines = ["| policy | labels | " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * (len(COLUMNS) + 2)]
    for name in found.names(BASELINE):
        first, *others = group = found.group(name)
        cells = [seeds_text(values(group, key)) if others else estimate_text(first.estimate(key)) for key in COLUMNS]
        lines.append(f"| {name} | {origin_text(first)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(folder: Path, experiment: str) -> None:
    """Publish the runs of an experiment below ``folder``."""
    folders = sorted(folder.glob("seed=*")) or [folder]
    found = collect(folders)
    seeds = sorted({row.seed for row in found.evaluations if row.seed is not None})
    command = f"python -m rlaif.run experiment={experiment} seed={','.join(map(str, seeds))}"
    command += " -m" if len(seeds) > 1 else ""
    block = (
        f"{BEGIN}\n`{command}`, on the held-out prompts of each seed; "
        f"{'mean (range over the seeds)' if len(seeds) > 1 else 'mean [95 % interval] (n prompts)'}.\n\n"
        f"{readme_table(found)}\n{END}"
    )
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_end:
        raise UserError(f"{readme}: no {BEGIN} ... {END} block")
    readme.write_text(before + block + after, encoding="utf-8")
    write_report(folders, folder, "Demo: a 135M model warms its own tone", BASELINE, 10, 0)
    results = (folder / "report.md").read_text(encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(f"<!-- made by: {command} -->\n\n{results}\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2])
