"""``python -m rlaif.label``: candidates -> labels.jsonl, preferences/ and quality.json."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlaif
from rlaif.artifacts import has_failures, labeler_inputs, plain, run_stage
from rlaif.cli import launch
from rlaif.config import Feedback, LabelConfig, LabelMode, Principles, Selection
from rlaif.constitution import find_constitution, load_constitution
from rlaif.labeling.candidates import CandidatesFile, open_candidates
from rlaif.labeling.store import STORE, STORE_FILES
from rlaif.records import (
    Candidates,
    UserError,
    atomic_file,
    existing_file,
    json_line,
    write_json,
)

if TYPE_CHECKING:
    from rlaif.engines.base import Engine
    from rlaif.labeling.aggregate import PairLabel
    from rlaif.labeling.audit import Comparison
    from rlaif.labeling.label import Labeling
    from rlaif.labeling.modes import Setup
    from rlaif.labeling.quality import VerdictQuality
    from rlaif.labeling.store import VerdictStore
    from rlaif.records import Preference

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
  labeling.mode=pairwise          or listwise (the best of all), pointwise (verdict words on one completion), score
                                  (1 to 9), contrastive (likelihood under the principle against its opposite)
  labeling.principles=each        or sample (one principle for each comparison), together (all in one prompt)
  labeling.rationales=2           pairwise: let the labeler reason first, twice, and average the verdicts
  labeling.pairs=adaptive         ask only the pairs whose order is uncertain (or against_best, or all)
  labeling.calibrate=FILE         measure the labeler's temperature and position bias on pairs labelled by people
  labeling.selection=all_pairs    or best_worst, length_balanced        labeling.min_margin=0.1
  combine=[DIR1,DIR2]             combine the labels of earlier runs on the same candidates; asks nobody
  gold=vader                      measure the labels against a programmatic gold judge
  feedback=simulated_human        labels drawn from the gold judge instead of a labeler (no people involved)
  feedback=style_order style_order=[warm,plain,gloomy]
                                  control: the styles of the candidates decide, the best first
  feedback=shuffled shuffle=DIR   control: the labels of an earlier run, each turned round by a fair coin

A rerun asks only what is not in store.sqlite yet, requests that failed included.
"""


def run_label(config: LabelConfig, output: Path) -> Path:
    """Label into ``output``; returns the path of the preference dataset."""
    lines = open_candidates(existing_file(config.candidates, "candidates"), config.data)
    if config.gold is not None:
        from rlaif.gold import check_gold

        check_gold(config.gold)
    if config.combine:
        _combine(lines, config, output)
    elif config.feedback is Feedback.ai:
        _label_with_ai(lines, config, output)
    elif config.feedback is Feedback.simulated_human:
        _label_with_annotator(lines, config, output)
    elif config.feedback is Feedback.style_order:
        _label_by_style(lines, config, output)
    elif config.feedback is Feedback.shuffled:
        _shuffle(lines, config, output)
    else:
        raise UserError(
            "feedback=human needs no labeling: give your preference dataset to rlaif.train as preferences=DIR"
        )
    return output / "preferences"


def _label_with_ai(lines: CandidatesFile, config: LabelConfig, output: Path) -> None:
    from rlaif.labeling.modes import Setup

    constitution = load_constitution(config.constitution)
    # Whether constitution and candidates are what the mode needs shows before an engine is started.
    Setup(constitution, "", config.labeling).expected(max(lines.sizes))
    weights = {principle.weight for principle in constitution.principles}
    joined = config.labeling.principles is Principles.together and config.labeling.mode is LabelMode.contrastive
    if joined and len(weights) > 1:
        log.warning(
            "labeling.principles=together: with labeling.mode=contrastive the principles' weights have no effect"
        )
    principles = find_constitution(config.constitution)
    comparisons = _comparisons(config.labeler.audit, "labeler.audit")
    known = _comparisons(config.labeling.calibrate, "labeling.calibrate")

    def make(folder: Path) -> None:
        from rlaif.engines import build_labeler
        from rlaif.labeling.label import Labeling
        from rlaif.labeling.live import agreement_with_gold
        from rlaif.labeling.quality import VerdictQuality, latency
        from rlaif.labeling.store import VerdictStore
        from rlaif.labeling.verdicts import advice

        started = time.perf_counter()
        with build_labeler(config.labeler, config.seed) as engine, VerdictStore(folder / STORE) as store, _loaded():
            loading = time.perf_counter() - started
            setup = Setup(constitution, engine.name, config.labeling, config.seed)
            calibration: dict[str, Any] = {}
            audit: dict[str, Any] = {}
            if known:
                setup, calibration = _calibrated(setup, known, engine, store)
                write_json(folder / "calibration.json", calibration)
            if comparisons:
                from rlaif.audit import measure, tell

                audit = measure(comparisons, setup, engine, store, folder / "audit", config.labeler.price)
                tell(audit)
                _check_agreement(audit, config, folder / "audit")
            truth = agreement_with_gold(config.gold) if config.gold is not None else None
            labeling = Labeling(lines, setup, engine, store, truth)
            started = time.perf_counter()
            expected = sum(setup.expected(size) * count for size, count in lines.sizes.items())
            labeling.ask(expected, sum(lines.sizes.values()))
            seconds, spent = loading + time.perf_counter() - started, engine.spent
            asked = labeling.answered / setup.answers_per_label
            quality = VerdictQuality()
            savings: Counter[str] = Counter()
            pairs, dropped = _pairs(labeling, quality, savings, folder / "labels.jsonl")

            def figures() -> dict[str, Any]:
                result = quality.result()
                if not result["methods"]:
                    said = "".join(f"; {reason}: {words}" for reason, words in labeling.failed.details.items() if words)
                    raise UserError(
                        f"the labeler gave no usable verdict in {result['n_verdicts']} requests; reasons: "
                        f"{quality.reasons()}{said}{advice(quality.reasons())}"
                    )
                if asked:
                    # Of this run: what an earlier one asked took time that is not counted here.
                    result["verdicts_per_s"] = round(asked / seconds, 3)
                    result |= latency(labeling.latencies)
                if spent is not None:
                    result["spent"] = {name: round(value, 6) for name, value in spent._asdict().items()}
                if setup.adaptive:
                    result["saved"] = dict(savings)
                if calibration:
                    result["calibration"] = calibration
                if audit:
                    # Whoever trains on the labels must see it.
                    names = ("verdict", "trainable", *(f"agreement{end}" for end in ("", "_n", "_low", "_high")))
                    result |= {f"audit_{name}": audit[name] for name in names if name in audit}
                return result | {
                    "mode": config.labeling.mode.value,
                    "constitution": constitution.name,
                    "constitution_version": constitution.version,
                    "principles": setup.weights,
                    "candidates": lines.digest,
                }

            _write_dataset(folder, pairs, dropped, figures, engine.name, config)

    settings = {"labeler": config.labeler} | plain(
        labeling=replace(config.labeling, calibrate=None),
        data=config.data,
        gold=config.gold,
        feedback=config.feedback,
    )
    inputs = {
        "candidates": lines.path,
        "constitution": principles,
        "audit": Path(config.labeler.audit) if config.labeler.audit else None,
        "calibrate": Path(config.labeling.calibrate) if config.labeling.calibrate else None,
        **labeler_inputs(config.labeler),
    }
    run_stage(
        "label", output, settings, inputs, make, config.seed, STORE_FILES, lambda f: has_failures(f / "quality.json")
    )


@contextlib.contextmanager
def _loaded() -> Iterator[None]:
    """What has been loaded by now is not gone through by the garbage collector again: a tenth of a label's time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _comparisons(file: str | None, key: str) -> list[Comparison]:
    """The labelled pairs of a file; none without one."""
    if file is None:
        return []
    from rlaif.labeling.audit import read_comparisons

    return read_comparisons(existing_file(file, key))


def _calibrated(
    setup: Setup, comparisons: Sequence[Comparison], engine: Engine, store: VerdictStore
) -> tuple[Setup, dict[str, Any]]:
    """The setup with what the labeler's verdicts on labelled pairs say of its bias and temperature, and the record."""
    from rlaif.labeling.calibration import measure
    from rlaif.labeling.label import label_candidates

    every_order = replace(setup.config, both_orders=True, second_order_below=None, stop_principles_above=None)
    asked = [comparison.candidates() for comparison in comparisons if comparison.truth]
    labels = label_candidates(asked, setup.constitution, engine, every_order, store, setup.seed)
    calibration, record = measure(engine.name, comparisons, labels, setup.weights, setup.config.min_principle_weight)
    log.info("calibration of %s: temperature %.3g, bias %+.3g", engine.name, calibration.temperature, calibration.bias)
    return replace(setup, calibration=calibration), record


def _pairs(
    labeling: Labeling, quality: VerdictQuality, savings: Counter[str], file: Path
) -> tuple[Iterator[tuple[Candidates, list[PairLabel]]], Counter[str]]:
    """The pair labels of each prompt, and a count of dropped pairs that grows as they are taken.

    On the way every verdict goes into ``file`` and into ``quality``, and those that were saved into ``savings``.
    """
    from rlaif.labeling.pairs import saved

    setup = labeling.setup
    dropped: Counter[str] = Counter()

    def each() -> Iterator[tuple[Candidates, list[PairLabel]]]:
        with atomic_file(file) as lines:
            for line, labels in labeling.labels():
                lines.writelines(json_line(label.to_json()) for label in labels)
                quality.add(labels)
                if setup.adaptive:
                    savings.update(saved(setup, len(line.candidates), labels))
                pairs, reasons = setup.pairs(labels)
                dropped.update(reasons)
                yield line, pairs

    return each(), dropped


def _combine(lines: CandidatesFile, config: LabelConfig, output: Path) -> None:
    from rlaif.labeling.combine import LABELS, Combination, open_source

    weights = config.combine_weights or [1.0] * len(config.combine)
    sources = [
        open_source(folder, weight, lines.digest) for folder, weight in zip(config.combine, weights, strict=True)
    ]
    for source in sources:
        if source.folder.resolve() == output.resolve():
            raise UserError(f"output_dir={output}: is one of the folders of combine=, which it would replace")

    def make(folder: Path) -> None:
        combination = Combination(lines(), sources)

        def pairs() -> Iterator[tuple[Candidates, list[PairLabel]]]:
            with atomic_file(folder / LABELS) as file:
                for line, labels, found in combination:
                    file.writelines(json_line(label.to_json()) for label in labels)
                    yield line, found

        _write_dataset(folder, pairs(), combination.dropped, combination.figures, combination.labeler, config)

    settings = plain(
        weights=weights,
        sources=[source.config for source in sources],
        rank=config.labeling.rank,
        selection=config.labeling.selection,
        min_margin=config.labeling.min_margin,
        data=config.data,
        gold=config.gold,
        feedback=config.feedback,
    )
    inputs = {"candidates": lines.path} | {
        f"combine_{place}_{name.partition('.')[0]}": source.folder / name
        for place, source in enumerate(sources)
        for name in (LABELS, "quality.json", "calibration.json")
        if (source.folder / name).is_file()
    }
    run_stage("label", output, settings, inputs, make, config.seed, carry_over=STORE_FILES)


def _check_agreement(audit: Mapping[str, Any], config: LabelConfig, folder: Path) -> None:
    """Stop before anything is paid for if the labeler is not good enough; ``folder`` has the audit."""
    wanted, found = config.labeler.min_agreement, audit.get("agreement")
    if wanted is not None and (found is None or found < wanted or not audit["trainable"]):
        measured = "no label at all" if found is None else f"{found:.1%} of {audit['n_labelled']} pairs"
        raise UserError(
            f"labeler.min_agreement={wanted}: {audit['labeler']} agrees with {config.labeler.audit} on {measured}. "
            f"{audit['verdict']} (the audit: {folder / 'audit.md'})"
        )


def _label_with_annotator(lines: CandidatesFile, config: LabelConfig, output: Path) -> None:
    if config.gold is None:
        raise UserError("feedback=simulated_human draws its labels from a gold judge: give gold=vader (or another)")
    gold = config.gold

    def make(folder: Path) -> None:
        from rlaif.preferences import simulated_human_pairs

        pairs = ((line, simulated_human_pairs(line, gold, config.annotator, config.seed)) for line in lines())
        figures = {"mode": "annotator", **vars(config.annotator)}
        _write_dataset(folder, pairs, Counter(), lambda: figures, f"simulated_human({gold})", config)

    settings = plain(
        annotator=config.annotator,
        selection=config.labeling.selection,
        data=config.data,
        gold=gold,
        feedback=config.feedback,
    )
    run_stage("label", output, settings, {"candidates": lines.path}, make, config.seed, carry_over=STORE_FILES)


def _label_by_style(lines: CandidatesFile, config: LabelConfig, output: Path) -> None:
    from rlaif.labeling.controls import style_order_pairs

    # Whether every candidate has a style that is named shows before anything is written.
    for line in lines():
        style_order_pairs(line, config.style_order)

    def make(folder: Path) -> None:
        pairs = ((line, style_order_pairs(line, config.style_order)) for line in lines())
        figures = {"mode": "style_order", "style_order": config.style_order}
        _write_dataset(
            folder, pairs, Counter(), lambda: figures, f"style_order({', '.join(config.style_order)})", config
        )

    settings = plain(
        style_order=config.style_order,
        selection=config.labeling.selection,
        data=config.data,
        gold=config.gold,
        feedback=config.feedback,
    )
    run_stage("label", output, settings, {"candidates": lines.path}, make, config.seed, carry_over=STORE_FILES)


def _shuffle(lines: CandidatesFile, config: LabelConfig, output: Path) -> None:
    from rlaif.labeling.combine import LABELS, Combination, open_source
    from rlaif.labeling.controls import shuffled_pairs

    assert config.shuffle is not None
    source = open_source(config.shuffle, 1.0, lines.digest, "shuffle")

    def make(folder: Path) -> None:
        combination = Combination(lines(), [source])
        pairs = ((line, shuffled_pairs(found, config.seed)) for line, _, found in combination)
        figures = {"mode": "shuffled", "shuffled": source.labeler}
        _write_dataset(folder, pairs, combination.dropped, lambda: figures, f"shuffled({source.labeler})", config)

    settings = plain(
        source=source.config,
        selection=config.labeling.selection,
        min_margin=config.labeling.min_margin,
        data=config.data,
        gold=config.gold,
        feedback=config.feedback,
    )
    inputs = {"candidates": lines.path, "shuffle": source.folder / LABELS}
    run_stage("label", output, settings, inputs, make, config.seed, carry_over=STORE_FILES)


def _write_dataset(
    folder: Path,
    pairs: Iterable[tuple[Candidates, list[PairLabel]]],
    dropped: Counter[str],
    figures: Callable[[], dict[str, Any]],
    labeler: str,
    config: LabelConfig,
) -> None:
    """The preference dataset and quality.json from the pairs of each prompt.

    Args:
        folder: where to write.
        pairs: every prompt with its pair labels.
        dropped: pairs that are dropped while ``pairs`` are taken, by reason.
        figures: of the verdicts, once all pairs have been taken.
        labeler: who made the labels.
        config: the command's.
    """
    from rlaif.labeling.live import summary
    from rlaif.labeling.quality import GoldAgreement, MissingWeight
    from rlaif.labeling.ranking import ranked_pairs
    from rlaif.preferences import PreferenceWriter, balanced, select_preferences

    rank, selection = config.labeling.rank and config.feedback is Feedback.ai, config.labeling.selection
    min_margin = config.labeling.min_margin if config.feedback is Feedback.ai else 0.0
    agreement = GoldAgreement(config.gold) if config.gold is not None else None
    counts: Counter[str] = Counter()
    missing = MissingWeight()

    def selected() -> Iterator[tuple[str, Preference]]:
        for line, found in pairs:
            if rank:
                names = [candidate.candidate_id for candidate in line.candidates]
                found, unconnected = ranked_pairs(line.prompt.prompt_id, names, found)
                dropped["not_connected"] += unconnected
            counts.update(n_pairs=len(found), n_inferred=sum(pair.inferred for pair in found))
            missing.add(found)
            if agreement is not None:
                agreement.add(line, found)
            kept, unselected = select_preferences(line, found, selection, min_margin, labeler, config.feedback.value)
            dropped.update(unselected)
            yield from ((line.split or "train", preference) for preference in kept)

    rows = selected()
    if selection is Selection.length_balanced:
        rows = balanced(rows, config.seed, dropped, folder)
    card = {"labeler": labeler, "feedback": config.feedback.value, "seed": config.seed, "rlaif": rlaif.__version__}
    with PreferenceWriter(folder / "preferences", card) as writer:
        for split, preference in rows:
            writer.add(split, [preference])
        quality = figures()
        made = ("mode", "constitution", "constitution_version", "audit_verdict")
        writer.card |= {name: quality[name] for name in made if name in quality}
        if rank:
            # Such pairs have a label after all, or are not connected.
            del dropped["no_verdict"], dropped["missing_weight"], dropped["not_by_all"]
            quality["n_inferred"] = counts["n_inferred"]
        reasons = {reason: count for reason, count in dropped.items() if count}
        if not writer.counts["train"]:
            raise UserError(f"no preference is left for training; dropped: {reasons}")
    if agreement is not None:
        quality |= agreement.result()
    if config.feedback is Feedback.ai:
        quality |= missing.result()
    quality |= {
        "seed": config.seed,
        "feedback": config.feedback.value,
        "labeler": labeler,
        "n_pairs": counts["n_pairs"],
        "n_preferences": writer.counts.total(),
        "dropped": reasons,
    }
    write_json(folder / "quality.json", quality)
    log.info("%s", summary(quality))


def main(config: LabelConfig, output: Path) -> None:
    """Entry of the command."""
    run_label(config, output)


if __name__ == "__main__":
    launch("label", main, USAGE)
