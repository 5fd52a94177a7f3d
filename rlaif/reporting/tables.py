"""The report's tables and its sample completions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlaif.artifacts import duration
from rlaif.redaction import redacted
from rlaif.reporting.collect import Collection, Estimate, Evaluation, Record, Sample, finite
from rlaif.reporting.statement import Line, averaged, distinct_seeds, judging_models, seed_text, values
from rlaif.reporting.terms import COMPARISON, OVER, PREFERENCE_MODEL, QUALITY, START, Terms
from rlaif.reporting.text import MISSING, Safe, estimate_text, number, origin_text, seeds_text


@dataclass(frozen=True)
class Row:
    """``summary`` rows sum up the rows above; ``starts`` marks the first row of a group."""

    cells: tuple[str, ...]
    summary: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Table:
    """A table and the meaning of the terms in its head."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    terms: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Example:
    """One prompt and what each row answered, in the order of the rows."""

    prompt_id: str
    prompt: tuple[tuple[str, str], ...]
    answers: tuple[Sample, ...]


def _columns(records: Sequence[Record], terms: Terms) -> Terms:
    return tuple(term for term in terms if any(r.values.get(term[0]) is not None for r in records))


def _figure(record: Record, key: str, plain: bool) -> str:
    if isinstance(record.values.get(key), dict):
        counts = record.values[key].items()
        return ", ".join(f"{reason}: {count}" for reason, count in counts) or Safe("none")
    value = finite(record.values.get(key))
    if plain and value is not None:
        return Safe(int(value)) if value == int(value) else number(value, 3 if abs(value) < 10 else None)
    return estimate_text(record.estimate(key))


def comparison(found: Collection, baseline: str) -> Table:
    """Every estimate of every row by seed; with several seeds also their mean and range.

    Gains over the baseline come from both rows' samples. Those over the policy that a row started from, which its own
    evaluation measured, are shown where they are not the same.
    """
    over = {e.folder: found.over(e, baseline).figures for e in found.evaluations if e.name != baseline}
    gains = tuple(term for term in OVER if any(term[0] in figures for figures in over.values()))
    start = tuple(term for term in START if any(_differs(e, term[0], over) for e in found.evaluations))
    terms = _columns(found.evaluations, COMPARISON)
    rows: list[Row] = []
    for name in found.names(baseline):
        group = found.group(name)
        unclear = len({e.seed for e in group}) < len(group)
        for index, e in enumerate(group):
            first: Line = (name, origin_text(e), seed_text(e.seed))
            if unclear:
                first = (f"{name} ({e.label})", *first[1:])
            figures = over.get(e.folder, {})
            cells: list[str] = [estimate_text(figures.get(key)) for key, *_ in gains]
            cells += [_cell(e, key, plain) for key, _, _, plain in (*start, *terms)]
            rows.append(Row((*first, *cells), starts=index == 0))
        if distinct_seeds(group):
            means: list[str] = [
                _mean(group, key, [figures[key].value for e in group if key in (figures := over.get(e.folder, {}))])
                for key, *_ in gains
            ]
            means += [_over_seeds(group, key, plain) for key, _, _, plain in (*start, *terms)]
            rows.append(Row((name, Safe(""), Safe(f"mean of {len(group)} seeds"), *means), summary=True))
    shown = (*gains, *start, *terms)
    heads = (Safe("row"), Safe("feedback"), Safe("seed"), *(Safe(head) for _, head, _, _ in shown))
    return Table(heads, tuple(rows), _meanings(shown))


def _differs(evaluation: Evaluation, key: str, over: Mapping[Path, Mapping[str, Estimate]]) -> bool:
    """Whether a row's own gain says something else than that over the baseline."""
    own, other = evaluation.estimate(key), over.get(evaluation.folder, {}).get(key)
    return own is not None and (other is None or abs(own.value - other.value) > 1e-5 or own.n != other.n)


def _cell(record: Record, key: str, plain: bool | None) -> str:
    return (record.text(key) or MISSING) if plain is None else _figure(record, key, plain)


def _over_seeds(group: Sequence[Evaluation], key: str, plain: bool | None) -> str:
    """Mean and range over seeds, where there is one."""
    return Safe("") if plain is None else _mean(group, key, values(group, key))


def _mean(group: Sequence[Evaluation], key: str, figures: Sequence[float]) -> Safe:
    return seeds_text(figures) if averaged(group, key) else Safe(f"{len(judging_models(group))} PMs")


def _meanings(terms: Terms) -> tuple[tuple[str, str], ...]:
    return tuple((Safe(head), Safe(meaning)) for _, head, meaning, _ in terms if meaning)


def _records(records: Sequence[Record], terms: Terms) -> Table | None:
    if not records:
        return None
    shown = _columns(records, terms)
    rows = []
    for record in records:
        feedback, seed = origin_text(record), seed_text(record.seed)
        figures = (_cell(record, key, plain) for key, _, _, plain in shown)
        rows.append(Row((record.label, feedback, seed, *figures), starts=True))
    heads = (Safe("folder"), Safe("feedback"), Safe("seed"), *(Safe(head) for _, head, _, _ in shown))
    return Table(heads, tuple(rows), _meanings(shown))


def label_quality(found: Collection) -> Table | None:
    return _records(found.qualities, QUALITY)


def preference_models(found: Collection) -> Table | None:
    return _records(found.preference_models, PREFERENCE_MODEL)


def failed_jobs(found: Collection) -> Table | None:
    if not found.failures:
        return None
    rows = []
    for job in found.failures:
        overrides = job.values.get("overrides")
        words = overrides if isinstance(overrides, list) else [overrides]
        # Written by another version, perhaps, that hid nothing.
        text = redacted(" ".join(str(word) for word in words if word is not None))
        rows.append(Row((job.label, text or MISSING, redacted(job.text("error") or "") or MISSING), starts=True))
    return Table((Safe("folder"), Safe("overrides"), Safe("error")), tuple(rows))


def wall_times(found: Collection) -> Table | None:
    """Wall time by stage, summed over the folders that the stage made."""
    times: dict[str, list[tuple[float, str]]] = {}
    for stage in found.stages:
        wall = finite(stage.values.get("wall_s"))
        if wall is not None:
            run = (wall, stage.text("device") or MISSING)
            times.setdefault(stage.text("stage") or MISSING, []).append(run)
    if not times:
        return None
    rows = []
    for name, runs in sorted(times.items()):
        walls, devices = [wall for wall, _ in runs], sorted({device for _, device in runs})
        spans = (Safe(duration(x)) for x in (sum(walls), min(walls), max(walls)))
        rows.append(Row((name, Safe(len(runs)), *spans, ", ".join(devices)), starts=True))
    heads = ("stage", "folders", "total", "shortest", "longest", "device")
    return Table(tuple(map(Safe, heads)), tuple(rows))


def provenance(found: Collection) -> Table | None:
    """Every commit, device, seed and version that took part, with the number of folders it made."""
    if not found.stages:
        return None
    counts: dict[tuple[str, str], int] = {}
    for stage in found.stages:
        facts = [(key, stage.text(key) or MISSING) for key in ("commit", "device", "platform", "seed")]
        versions = stage.values.get("versions")
        if isinstance(versions, dict):
            facts += [(str(package), str(version)) for package, version in versions.items()]
        for fact in facts:
            counts[fact] = counts.get(fact, 0) + 1
    rows = [Row((*fact, Safe(count)), starts=True) for fact, count in counts.items() if fact[1] != MISSING]
    order = list(dict.fromkeys(what for what, _ in counts))
    rows.sort(key=lambda row: order.index(row.cells[0]))
    return Table((Safe("what"), Safe("value"), Safe("stage folders")), tuple(rows))


def examples(found: Collection, baseline: str, count: int, seed: int) -> tuple[list[Evaluation], list[Example]]:
    """``count`` prompts drawn by ``seed`` from those that every row answered, with the first seed's answers.

    Rows without any samples are left out; the evaluations that are shown are returned as well.
    """
    first = [found.group(name)[0] for name in found.names(baseline)]
    shown = [e for e in first if e.samples]
    common = sorted(set.intersection(*(set(e.samples) for e in shown))) if shown else []
    drawn = random.Random(seed).sample(common, min(max(count, 0), len(common)))
    return shown, [Example(p, shown[0].samples[p].prompt, tuple(e.samples[p] for e in shown)) for p in drawn]
