"""Audit the embedded model in every mode on sets of human-labelled pairs, and write docs/audits.md from what came out.

python scripts/publish_audits.py DATA_DIR runs/audits [PAIRS]

DATA_DIR holds the sets as JSONL (NAME.jsonl or NAME.jsonl.gz). Audits that are there already are not made again.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from rlaif.records import read_json

ROOT = Path(__file__).parent.parent
SETS = {
    "llmbar": "instruction_following",
    "hh_harmless_test": "harmless",
    "hh_helpful_test": "helpful",
    "pandalm_human": "instruction_following",
    "tulu_human_eval": "instruction_following",
}
MODES = {
    "pairwise": ["labeling.mode=pairwise"],
    "pairwise, all principles at once": ["labeling.mode=pairwise", "labeling.principles=together"],
    "pairwise, one order": ["labeling.mode=pairwise", "labeling.both_orders=false"],
    "rationale first": ["labeling.mode=pairwise", "labeling.rationales=1", "labeling.rationale_tokens=48"],
    "verdict words": ["labeling.mode=pointwise"],
    "score 1-10": ["labeling.mode=score"],
    "listwise": ["labeling.mode=listwise"],
    "contrastive": ["labeling.mode=contrastive"],
}
HEAD = """<!-- made by scripts/publish_audits.py -->

# Audits of the embedded model

SmolLM2-135M-Instruct as labeler, against people, by [rlaif.audit](audit.md): {pairs} pairs of each set, spread evenly
over it; mean [95 % interval], resampled by prompt. Where nothing else is said, one principle of the constitution is
drawn for each pair (`labeling.principles=sample`) and pairs are asked in both orders. It is the model that labels tone
in the [demo](demo.md), where it agrees with the gold judge on three quarters of all pairs. As a labeler of anything
harder it is not to be trusted, and this is what that looks like.

*mass* is the option mass: the probability that the model puts on any of the answers it was asked for; *missing* counts
verdicts without an answer. By default most of these verdicts would count as uncovered (`labeling.min_option_mass`, 0.5
except for verdict words), and there would be no labels to audit. To see what they would have been, the limit is 0.01
here, for every mode.

"no" under *train on it?* means that agreement is below chance or can't be told from it; "better than length" that it is
above chance and also above what preferring the longer completion reaches; "not beyond length" that it is above chance
and not shown to be more than that.

| set | constitution | mode | agreement | longer wins | same position | kappa | mass | missing | ECE | train on it? |
|---|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
The command: `python scripts/publish_audits.py DATA_DIR runs/audits {pairs}`. The sets are public (LLMBar; Anthropic's
HH, harmless and helpful test splits; PandaLM's test set; the human evaluation of Tulu) and not part of this repository.
Among people who both took a side, {ceilings}.
"""


def row(name: str, mode: str, found: dict[str, Any]) -> str:
    """One audit as a line of the table."""

    def estimate(key: str) -> str:
        if key not in found:
            return "–"
        return f"{found[key]:.1%} [{found[key + '_low']:.1%}, {found[key + '_high']:.1%}]"

    missing = sum(found.get(key, 0) for key in ("uncovered", "unlisted", "failed"))
    kappa, mass, ece = (
        f"{found[key]:.2f}" if found.get(key) is not None else "–" for key in ("kappa", "option_mass_mean", "ece")
    )
    said = found["verdict"]
    advice = "better than length"
    if said.startswith(("DO NOT", "NO ")):
        advice = "no"
    elif "not shown" in said:
        advice = "not beyond length"
    estimates = " | ".join(estimate(key) for key in ("agreement", "longer_wins", "same_position_rate"))
    return (
        f"| {name} | {found['constitution']} | {mode} | {estimates} | {kappa} | {mass} | "
        f"{missing} of {found['n_verdicts']} | {ece} | {advice} |"
    )


def folder_of(out: Path, name: str, mode: str) -> Path:
    """Where the audit of a set in a mode lies."""
    return out / name / mode.replace(" ", "_").replace(",", "")


def page(out: Path, pairs: int) -> str:
    """The page, from the audits of so many pairs that are there."""
    lines: list[str] = []
    ceilings: dict[str, str] = {}
    missing: list[str] = []
    for name in SETS:
        for mode in MODES:
            file = folder_of(out, name, mode) / "audit.json"
            found = read_json(file) if file.is_file() else {}
            if found.get("n_comparisons") != pairs:
                missing.append(f"{mode} on {name}")
                continue
            lines.append(row(name, mode, found))
            if "human_ceiling" in found:
                low, high = found["human_ceiling_low"], found["human_ceiling_high"]
                ceilings[name] = f"{found['human_ceiling']:.1%} [{low:.1%}, {high:.1%}] agree on {name}"
    text = HEAD.format(pairs=pairs) + "\n".join(lines) + "\n"
    if missing:
        text += f"\nNot measured yet: {', '.join(missing)}.\n"
    return text + TAIL.format(pairs=pairs, ceilings="; ".join(ceilings.values()))


def main(data: Path, out: Path, pairs: int) -> None:
    """Audit every set in every mode; the page grows as they end."""
    for mode, settings in MODES.items():
        for name, constitution in SETS.items():
            [file] = data.glob(f"{name}.jsonl*")
            drawn = [] if "labeling.principles=together" in settings else ["labeling.principles=sample"]
            subprocess.run(
                [
                    *(sys.executable, "-m", "rlaif.audit", f"comparisons={file}", f"constitution={constitution}"),
                    *("labeler=hf", "labeler.model=embedded", f"max_pairs={pairs}"),
                    f"output_dir={folder_of(out, name, mode)}",
                    *("labeling.min_option_mass=0.01", *settings, *drawn),
                ],
                check=True,
            )
            (ROOT / "docs" / "audits.md").write_text(page(out, pairs), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else 100)
