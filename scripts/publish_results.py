"""Write the demo's results into README.md (between its markers) and docs/results.md.

python -m rlaif.run experiment=demo seed=1,2,3 -m
python scripts/publish_results.py runs/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlaif.records import UserError
from rlaif.reporting import write_report
from rlaif.reporting.collect import Evaluation, collect
from rlaif.reporting.text import estimate_text

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
COLUMNS = {
    "gold_score": "gold score (VADER)",
    "gold_gain": "gain over base",
    "win_rate": "win rate",
    "kl": "KL (nats)",
    "length": "tokens",
}


def readme_table(rows: list[Evaluation]) -> str:
    """One line per policy and seed."""
    lines = ["| policy | seed | " + " | ".join(COLUMNS.values()) + " |", "|" + " --- |" * (len(COLUMNS) + 2)]
    for row in rows:
        cells = [estimate_text(row.estimate(key)) or "–" for key in COLUMNS]
        lines.append(f"| {row.name} | {row.seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Publish the runs below ``folder``."""
    folders = sorted(folder.glob("seed=*")) or [folder]
    found = collect(folders)
    rows = sorted(found.evaluations, key=lambda row: (row.name != "base", row.name, row.seed or 0))
    seeds = sorted({row.seed for row in rows if row.seed is not None})
    command = f"python -m rlaif.run experiment=demo seed={','.join(map(str, seeds))}"
    command += " -m" if len(seeds) > 1 else ""
    block = (
        f"{BEGIN}\n`{command}`; mean [95 % interval] (n prompts), held-out prompts; `rlhf_ppo` is trained on "
        f"`simulated_human` labels (a programmatic annotator, not people).\n\n{readme_table(rows)}\n{END}"
    )
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found_end:
        raise UserError(f"{readme}: no {BEGIN} ... {END} block")
    readme.write_text(before + block + after, encoding="utf-8")
    write_report(folders, folder, "Demo: a 135M model warms its own tone", "base", 10, 0)
    results = (folder / "report.md").read_text(encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(f"<!-- made by: {command} -->\n\n{results}\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
