"""Audit the embedded model in every mode on sets of human-labelled pairs; publish docs/audits.json and docs/audits.md.

python scripts/publish_audits.py DATA_DIR runs/audits [PAIRS]    audit, and write both
python scripts/publish_audits.py                                 write the page again from docs/audits.json

DATA_DIR holds the sets as JSONL (NAME.jsonl or NAME.jsonl.gz). Audits that are there already are not made again, and
both files grow as audits end.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlaif.records import atomic_file, read_json

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "docs" / "audits.json", ROOT / "docs" / "audits.md"
SETS = {
    "llmbar": "instruction_following",
    "hh_harmless_test": "harmless",
    "hh_helpful_test": "helpful",
    "pandalm_human": "instruction_following",
    "tulu_human_eval": "instruction_following",
}
ONE = "labeling.principles=sample"
MODES = {
    "pairwise": [ONE],
    "pairwise, every principle": ["labeling.principles=each"],
    "pairwise, all principles at once": ["labeling.principles=together"],
    "pairwise, few-shot exemplars": ["labeling.exemplars=true", ONE],
    "pairwise, one order": ["labeling.both_orders=false", ONE],
    "rationale first": ["labeling.rationales=1", "labeling.rationale_tokens=48", ONE],
    "two rationales first": ["labeling.rationales=2", "labeling.rationale_tokens=48", ONE],
    "verdict words": ["labeling.mode=pointwise", ONE],
    "score 1-9": ["labeling.mode=score", ONE],
    "listwise": ["labeling.mode=listwise", ONE],
    "contrastive": ["labeling.mode=contrastive", ONE],
}
HEAD = """<!-- made by scripts/publish_audits.py -->

# Audits of the embedded model

SmolLM2-135M-Instruct as labeler, against people, by [rlaif.audit](audit.md): {pairs} pairs of each set, spread evenly
over it; mean [95 % interval], over prompts. Where nothing else is said, one principle of the constitution is
drawn for each pair (`labeling.principles=sample`) and pairs are asked in both orders. It is the model that labels tone
in the [demo](demo.md), where it agrees with the gold judge on three quarters of all pairs. As a labeler of anything
harder it is not to be trusted, and this is what that looks like. All figures of every audit, those by principle and by
length among them: [audits.json](audits.json).

*bias* is the position bias: the mean logit in favour of the completion shown first, which both orders cancel. *mass* is
the option mass: the probability that the model puts on any of the answers it was asked for; *missing* counts
verdicts without an answer. By default most of these verdicts would count as uncovered (`labeling.min_option_mass`, 0.5
except for verdict words), and there would be no labels to audit. To see what they would have been, the limit is 0.01
here, for every mode.

*use?* is for training: "no" means that agreement is below chance or can't be told from it; "better than length" that it
is above chance and above what preferring the longer completion reaches; "not beyond length" that it is above chance and
not shown to be more than that.

| set | constitution | mode | agreement | longer wins | same position | bias | kappa | mass | missing | ECE | use? |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
The command: `python scripts/publish_audits.py DATA_DIR runs/audits {pairs}`{where}. The sets are public (LLMBar;
Anthropic's HH, harmless and helpful test splits; PandaLM's test set; the human evaluation of Tulu) and not part of this
repository.{ceilings}
"""


def row(name: str, mode: str, found: Mapping[str, Any]) -> str:
    """One audit as a line of the table."""

    def estimate(key: str, form: str = "{:.1%}") -> str:
        if key not in found:
            return "–"
        value, low, high = (form.format(found[key + end]) for end in ("", "_low", "_high"))
        return f"{value} [{low}, {high}]"

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
        f"| {name} | {found['constitution']} | {mode} | {estimates} | {estimate('position_bias', '{:+.2f}')} | "
        f"{kappa} | {mass} | {missing} of {found['n_verdicts']} | {ece} | {advice} |"
    )


def folder_of(out: Path, name: str, mode: str) -> Path:
    """Where the audit of a set in a mode lies."""
    return out / name / mode.replace(" ", "_").replace(",", "")


def collect(out: Path, pairs: int) -> dict[str, Any]:
    """The figures of the audits of so many pairs that are there, by set and mode, and what made them."""
    audits: dict[str, dict[str, Any]] = {}
    made: dict[str, Any] = {}
    for name in SETS:
        for mode in MODES:
            folder = folder_of(out, name, mode)
            found = read_json(folder / "audit.json") if (folder / "audit.json").is_file() else {}
            if found.get("n_comparisons") == pairs:
                provenance = read_json(folder / "provenance.json")
                own = {key: provenance[key] for key in ("wall_s", "commit")}
                audits.setdefault(name, {})[mode] = {**found, **own}
                made = {key: provenance[key] for key in ("commit", "device", "versions")}
    return {"pairs": pairs, "made": made, "audits": audits}


def page(results: Mapping[str, Any]) -> str:
    """The page."""
    lines: list[str] = []
    missing: list[str] = []
    ceilings: dict[str, str] = {}
    for name in SETS:
        for mode in MODES:
            found = results["audits"].get(name, {}).get(mode)
            if found is None:
                missing.append(f"{mode} on {name}")
                continue
            lines.append(row(name, mode, found))
            if "human_ceiling" in found:
                low, high = found["human_ceiling_low"], found["human_ceiling_high"]
                ceilings[name] = f"{found['human_ceiling']:.1%} [{low:.1%}, {high:.1%}] agree on {name}"
    text = HEAD.format(pairs=results["pairs"]) + "\n".join(lines) + "\n"
    if missing:
        text += f"\nNot measured yet: {'; '.join(missing)}.\n"
    made = results["made"]
    others = {
        (mode, found["commit"])
        for modes in results["audits"].values()
        for mode, found in modes.items()
        if found.get("commit", made.get("commit")) != made.get("commit")
    }
    but = "".join(f" ({mode}: {commit})" for mode, commit in sorted(others))
    where = f", at commit {made['commit']}{but}, {made['device']}" if made else ""
    people = f" Among people who both took a side, {'; '.join(ceilings.values())}." if ceilings else ""
    return text + TAIL.format(pairs=results["pairs"], where=where, ceilings=people)


def publish(results: Mapping[str, Any]) -> None:
    """Both files; in the JSON, an audit a line."""
    sets = []
    for name, modes in results["audits"].items():
        lines = (f"{json.dumps(mode)}: {json.dumps(found, ensure_ascii=False)}" for mode, found in modes.items())
        sets.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    head = json.dumps({key: value for key, value in results.items() if key != "audits"}, ensure_ascii=False)
    with atomic_file(RESULTS) as file:
        file.write(head[:-1] + ', "audits": {\n' + ",\n".join(sets) + "\n}}\n")
    PAGE.write_text(page(results), encoding="utf-8")


def main(data: Path, out: Path, pairs: int) -> None:
    """Audit every set in every mode."""
    for mode, settings in MODES.items():
        for name, constitution in SETS.items():
            [file] = data.glob(f"{name}.jsonl*")
            subprocess.run(
                [
                    *(sys.executable, "-m", "rlaif.audit", f"comparisons={file}", f"constitution={constitution}"),
                    *("labeler=hf", "labeler.model=embedded", f"max_pairs={pairs}"),
                    f"output_dir={folder_of(out, name, mode)}",
                    *("labeling.min_option_mass=0.01", *settings),
                ],
                check=True,
            )
            publish(collect(out, pairs))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        publish(read_json(RESULTS))
    elif len(sys.argv) in (3, 4):
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) == 4 else 100)
    else:
        sys.exit(__doc__)
