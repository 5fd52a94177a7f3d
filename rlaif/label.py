"""``python -m rlaif.label``: candidates -> labels.jsonl, preferences/ and quality.json."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlaif.artifacts import labeler_inputs, labeler_settings, plain, run_stage
from rlaif.cli import launch
from rlaif.config import Feedback, LabelConfig
from rlaif.constitution import find_constitution, load_constitution
from rlaif.labeling.store import STORE, STORE_FILES
from rlaif.records import (
    Candidates,
    UserError,
    existing_file,
    read_candidates,
    read_json,
    write_json,
    write_jsonl,
)

log = logging.getLogger("rlaif")

USAGE = """
Label candidate completions by written principles; build the preference dataset.

  python -m rlaif.label candidates=FILE output_dir=DIR constitution=NAME_OR_FILE labeler=... [key=value ...] [-m]

  candidates=FILE                 JSONL from rlaif.sample, or {"prompt": ..., "completions": [text, ...]} a line
  output_dir=DIR                  gets labels.jsonl, preferences/, quality.json, store.sqlite
  constitution=harmless           harmless, helpful, honest, summarize, concise, warm, instruction_following,
                                  or a YAML file of your own
  labeler=hf labeler.model=NAME   transformers in process (`embedded` needs no hub)
  labeler=vllm labeler.model=NAME vLLM in a process of its own (`make setup-vllm` installs it)
  labeler=openai labeler.base_url=URL labeler.model=NAME
                                  any OpenAI-compatible server; the key comes from $OPENAI_API_KEY
  labeler=scripted                a deterministic labeler with a known utility, bias and noise
  labeling.mode=pairwise          or pointwise (verdict words on one completion at a time)
  labeling.rationales=2           pairwise: let the labeler reason first, twice, and average the verdicts
  labeling.selection=all_pairs    or best_worst        labeling.min_margin=0.1
  gold=vader                      measure the labels against a programmatic gold judge
  feedback=simulated_human        labels drawn from the gold judge instead of a labeler (no people involved)

A rerun asks only what is not in store.sqlite yet, requests that failed included.
"""


def run_label(config: LabelConfig, output: Path) -> Path:
    """Label into ``output``; returns the path of the preference dataset."""
    file = existing_file(config.candidates, "candidates")
    lines = _with_splits(read_candidates(file), config)
    if config.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.gold)
    if config.feedback is Feedback.ai:
        _label_with_ai(lines, file, config, output)
    elif config.feedback is Feedback.simulated_human:
        _label_with_annotator(lines, file, config, output)
    else:
        raise UserError(
            "feedback=human needs no labeling: give your preference dataset to rlaif.train as preferences=DIR"
        )
    return output / "preferences"


def _with_splits(lines: Sequence[Candidates], config: LabelConfig) -> list[Candidates]:
    from rlaif.splits import assign_splits, check_no_leak

    given = [line for line in lines if line.split]
    if given and len(given) < len(lines):
        raise UserError(f"{config.candidates}: {len(given)} of {len(lines)} lines have a split; all or none must")
    prompts = [line.prompt for line in lines]
    if given:
        splits = {line.prompt.prompt_id: str(line.split) for line in lines}
        unknown = set(splits.values()) - {"train", "validation", "test"}
        if unknown:
            raise UserError(f"{config.candidates}: unknown split {', '.join(sorted(unknown))}")
        check_no_leak(prompts, splits, config.data.near_duplicate_threshold)
        return list(lines)
    assigned = assign_splits(prompts, config.data)
    return [replace(line, split=assigned[line.prompt.prompt_id].value) for line in lines]


def _label_with_ai(lines: list[Candidates], file: Path, config: LabelConfig, output: Path) -> None:
    constitution = load_constitution(config.constitution)
    principles = find_constitution(config.constitution)
    comparisons: list[Any] = []
    if config.labeler.audit is not None:
        from rlaif.labeling.audit import read_comparisons

        comparisons = read_comparisons(existing_file(config.labeler.audit, "labeler.audit"))

    def make(folder: Path) -> None:
        from rlaif.engines import build_labeler
        from rlaif.labeling.aggregate import pair_labels
        from rlaif.labeling.label import label_candidates
        from rlaif.labeling.quality import verdict_quality
        from rlaif.labeling.store import VerdictStore

        started = time.perf_counter()
        with build_labeler(config.labeler, config.seed) as engine, VerdictStore(folder / STORE) as store:
            if comparisons:
                from rlaif.audit import measure

                audit = measure(
                    comparisons, constitution, engine, config.labeling, store, folder / "audit", config.seed
                )
                _check_agreement(audit, config)
            labels = label_candidates(lines, constitution, engine, config.labeling, store, config.seed)
            name, asked = engine.name, store.written
        seconds = time.perf_counter() - started
        write_jsonl(folder / "labels.jsonl", (label.to_json() for label in labels))
        if not any(label.p is not None for label in labels):
            raise UserError(
                f"the labeler gave no usable verdict in {len(labels)} requests; first reason: {labels[0].reason}"
            )
        weights = {principle.id: principle.weight for principle in constitution.principles}
        pairs, dropped = pair_labels(labels, weights, config.labeling.temperature, config.labeling.both_orders)
        quality = verdict_quality(labels)
        if asked:
            # Of this run: what an earlier one asked took time that is not counted here.
            quality["verdicts_per_s"] = round(asked / seconds, 3)
        quality |= {"mode": config.labeling.mode.value, "constitution": constitution.name}
        _finish(folder, lines, pairs, dropped, quality, name, config)

    settings = plain(
        labeler=labeler_settings(config.labeler),
        labeling=config.labeling,
        data=config.data,
        gold=config.gold,
        feedback=config.feedback,
    )
    inputs = {
        "candidates": file,
        "constitution": principles,
        "audit": Path(config.labeler.audit) if config.labeler.audit else None,
        **labeler_inputs(config.labeler),
    }
    run_stage("label", output, settings, inputs, make, config.seed, carry_over=STORE_FILES, unfinished=_has_failures)


def _check_agreement(audit: Mapping[str, Any], config: LabelConfig) -> None:
    """Stop before anything is paid for if the labeler is not good enough."""
    wanted, found = config.labeler.min_agreement, audit.get("agreement")
    if wanted is not None and (found is None or found < wanted):
        measured = "no label at all" if found is None else f"{found:.1%} of {audit['n_labelled']} pairs"
        raise UserError(
            f"labeler.min_agreement={wanted}: {audit['labeler']} agrees with {config.labeler.audit} on {measured}. "
            f"{audit['verdict']}"
        )


def _has_failures(folder: Path) -> bool:
    """Whether requests failed that a rerun may get an answer to."""
    return bool(read_json(folder / "quality.json").get("failed"))


def _label_with_annotator(lines: list[Candidates], file: Path, config: LabelConfig, output: Path) -> None:
    if config.gold is None:
        raise UserError("feedback=simulated_human draws its labels from a gold judge: give gold=vader (or another)")
    gold = config.gold

    def make(folder: Path) -> None:
        from rlaif.preferences import simulated_human_pairs

        pairs = simulated_human_pairs(lines, gold, config.annotator, config.seed)
        quality = {"mode": "annotator", "flip": config.annotator.flip, "scale": config.annotator.scale}
        _finish(folder, lines, pairs, {}, quality, f"simulated_human({gold})", config)

    settings = plain(
        annotator=config.annotator,
        selection=config.labeling.selection,
        data=config.data,
        gold=gold,
        feedback=config.feedback,
    )
    run_stage("label", output, settings, {"candidates": file}, make, config.seed, carry_over=STORE_FILES)


def _finish(
    folder: Path,
    lines: list[Candidates],
    pairs: Sequence[Any],
    dropped: dict[str, int],
    quality: dict[str, Any],
    labeler: str,
    config: LabelConfig,
) -> None:
    from rlaif.labeling.quality import gold_agreement
    from rlaif.preferences import select_preferences, write_preferences

    by_split, unselected = select_preferences(
        lines,
        pairs,
        config.labeling.selection,
        config.labeling.min_margin if config.feedback is Feedback.ai else 0.0,
        labeler,
        config.feedback.value,
    )
    if not by_split.get("train"):
        raise UserError(f"no preference is left for training; dropped: {dropped | unselected}")
    if config.gold is not None:
        quality |= gold_agreement(lines, pairs, config.gold)
    quality |= {
        "seed": config.seed,
        "feedback": config.feedback.value,
        "labeler": labeler,
        "n_pairs": len(pairs),
        "n_preferences": sum(len(rows) for rows in by_split.values()),
        "dropped": {k: v for k, v in (dropped | unselected).items() if v},
    }
    write_preferences(folder / "preferences", by_split, {"labeler": labeler, "feedback": config.feedback.value})
    write_json(folder / "quality.json", quality)
    log.info("%s", summary(quality))


def summary(quality: dict[str, Any]) -> str:
    """The labeling run in one paragraph for the terminal."""
    parts = [f"{quality['n_preferences']} preferences from {quality['n_pairs']} pairs"]
    if quality.get("dropped"):
        parts.append("dropped: " + ", ".join(f"{n} {reason}" for reason, n in quality["dropped"].items()))
    if "same_position_rate" in quality:
        parts.append(
            f"same position in both orders {quality['same_position_rate']:.0%}, "
            f"position bias {quality['position_bias']:+.2f} logits"
        )
    if "agreement" in quality:
        low, high = quality["agreement_low"], quality["agreement_high"]
        parts.append(f"agreement with {quality['gold']} {quality['agreement']:.1%} [{low:.1%}, {high:.1%}]")
        if low <= 0.5:
            parts.append("WARNING: no better than chance; do not train on these labels")
    return "; ".join(parts)


def main(config: LabelConfig, output: Path) -> None:
    """Entry of the command."""
    run_label(config, output)


if __name__ == "__main__":
    launch("label", main, USAGE)
