"""Finds what runs left in their folders and reads it into typed records.

Folders come from sweeps, interrupted runs and other versions, so nothing but an evaluation is required: an
absent figure stays absent, and a file that cannot be read becomes a *problem* that the report lists.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif.evaluation.statistics import Estimate as Measured
from rlaif.evaluation.statistics import paired_gain
from rlaif.folders import is_set_aside
from rlaif.records import UserError, existing_dir, read_json, read_jsonl

EVALUATION_KEYS = ("gold_score", "win_rate", "length")
SKIPPED = "checkpoints"
_SUFFIXES = ("_n", "_low", "_high")


@dataclass(frozen=True)
class Estimate:
    """A figure, the number of things it was measured on and its 95 % interval (``None``: not recorded)."""

    value: float
    n: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Sample:
    """The first completion that a row gave to one prompt."""

    prompt_id: str
    prompt: tuple[tuple[str, str], ...]
    completion: str
    gold_score: float | None = None
    tokens: int | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class Record:
    """A flat JSON file of figures: an evaluation, a label quality or a preference model's metrics."""

    folder: Path
    label: str
    root: Path
    values: Mapping[str, Any]

    def text(self, key: str) -> str | None:
        """A value as text; ``None`` if absent."""
        value = self.values.get(key)
        return None if value is None else value if isinstance(value, str) else json.dumps(value)

    def whole(self, key: str) -> int | None:
        """A value as a whole number; ``None`` if absent or no number."""
        value = finite(self.values.get(key))
        return None if value is None else round(value)

    def estimate(self, key: str) -> Estimate | None:
        """The figure ``key`` with its n and interval; ``None`` if absent or no finite number."""
        value = finite(self.values.get(key))
        if value is None:
            return None
        n, low, high = (finite(self.values.get(key + suffix)) for suffix in _SUFFIXES)
        return Estimate(value, None if n is None else round(n), low, high)

    @property
    def seed(self) -> int | None:
        return self.whole("seed")


Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Of each prompt the scores of its samples by number: ``gold_score`` and ``pm_score``, as far as there are any."""


@dataclass(frozen=True)
class Evaluation(Record):
    """One row of the comparison: ``metrics.json`` and the samples beside it."""

    samples: Mapping[str, Sample] = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.text("name") or self.label


@dataclass(frozen=True)
class Comparison:
    """A row's ``gold_gain``, ``win_rate`` and ``pm_gain`` over another row; or why there are none."""

    figures: Mapping[str, Estimate] = field(default_factory=dict)
    problem: str = ""


def compared(evaluation: Evaluation, baselines: Sequence[Evaluation]) -> Comparison:
    """An evaluation against that of the baseline with its seed (or the only one), paired by prompt and sample.

    Of several with its seed the one in the closest folder counts: that of the same run.
    """
    alike = [other for other in baselines if other.seed == evaluation.seed] or list(baselines[: len(baselines) == 1])
    depth = [_shared_depth(evaluation.folder, other.folder) for other in alike]
    closest = [other for other, shared in zip(alike, depth, strict=True) if shared == max(depth)]
    if len(closest) != 1:
        return Comparison(problem="it has several rows of that seed" if closest else "it has no row of that seed")
    return _paired(evaluation, closest[0])


def _shared_depth(one: Path, other: Path) -> int:
    return len(Path(os.path.commonpath([one, other])).parts)


def _paired(evaluation: Evaluation, other: Evaluation) -> Comparison:
    shared = sorted(set(evaluation.scores) & set(other.scores))
    if not shared:
        empty = not evaluation.scores or not other.scores
        return Comparison(problem="one of them has no samples.jsonl" if empty else "they share no prompts")
    if any(evaluation.samples[name].prompt != other.samples[name].prompt for name in shared):
        return Comparison(problem="the same prompt ids stand for other texts")
    figures = {}
    for judge, identity in (("gold", "gold"), ("pm", "preference_model_id")):
        key = f"{judge}_score"
        if evaluation.text(identity) is None or evaluation.text(identity) != other.text(identity):
            continue
        pairs = [
            (name, mine[key], theirs[key])
            for name in shared
            for number, mine in sorted(evaluation.scores[name].items())
            if key in mine and key in (theirs := other.scores[name].get(number, {}))
        ]
        gain = paired_gain([x for _, x, _ in pairs], [x for _, _, x in pairs], [name for name, _, _ in pairs])
        if gain is not None:
            figures[f"{judge}_gain"] = _shown(gain.gain)
            if judge == "gold":
                figures["win_rate"] = _shown(gain.win_rate)
    return Comparison(figures, "" if figures else "no judge scored both")


def _shown(estimate: Measured) -> Estimate:
    return Estimate(estimate.value, estimate.n, finite(estimate.low), finite(estimate.high))


@dataclass(frozen=True)
class Curve:
    """A training curve. ``name`` is its row's name, or its folder where no single row owns it."""

    kind: str
    name: str
    seed: int | None
    lines: tuple[Mapping[str, float], ...]

    def points(self, key: str) -> list[tuple[float, float]]:
        """``(iteration or step, value)`` of every line that has ``key``."""
        return [
            (line.get("iteration", line.get("step", float(index))), line[key])
            for index, line in enumerate(self.lines)
            if key in line
        ]


@dataclass
class Collection:
    """Everything that was found below the roots."""

    evaluations: list[Evaluation] = field(default_factory=list)
    qualities: list[Record] = field(default_factory=list)
    preference_models: list[Record] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    stages: list[Record] = field(default_factory=list)
    failures: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _compared: dict[tuple[Path, str], Comparison] = field(default_factory=dict)

    def over(self, evaluation: Evaluation, baseline: str) -> Comparison:
        """An evaluation against the row ``baseline``."""
        key = (evaluation.folder, baseline)
        if key not in self._compared:
            self._compared[key] = compared(evaluation, self.group(baseline))
        return self._compared[key]

    def names(self, baseline: str) -> list[str]:
        """Names of the rows, the baseline first."""
        return sorted({e.name for e in self.evaluations}, key=lambda name: (name != baseline, name))

    def group(self, name: str) -> list[Evaluation]:
        """The evaluations of one name, by seed."""
        return [e for e in self.evaluations if e.name == name]


def finite(value: Any) -> float | None:
    """``value`` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def collect(roots: Sequence[Path]) -> Collection:
    """Read every run folder below ``roots``.

    Raises:
        UserError: if a root is no folder, or no evaluation lies below any of them.
    """
    found = Collection()
    curve_files: list[Record] = []
    lists: dict[str, list[Record]] = {
        "quality.json": found.qualities,
        "pm_metrics.json": found.preference_models,
        "provenance.json": found.stages,
        "failed.json": found.failures,
    }
    for root, folder, files in _folders(roots):
        relative = folder.relative_to(root).as_posix()
        parts = [root.name] * (len(roots) > 1 or relative == ".") + [relative] * (relative != ".")
        label = "/".join(parts)
        for file in files:
            if file == "training.jsonl":
                curve_files.append(Record(folder, label, root, {}))
            elif file in lists or file == "metrics.json":
                values = _read_object(folder / file, found.problems)
                if values is None:
                    continue
                if file in lists:
                    lists[file].append(Record(folder, label, root, values))
                elif any(key in values for key in EVALUATION_KEYS):
                    samples, scores = _read_samples(folder / "samples.jsonl", found.problems)
                    found.evaluations.append(Evaluation(folder, label, root, values, samples, scores))
    if not found.evaluations:
        where = ", ".join(str(root) for root in roots) or "no folder given"
        raise UserError(
            f"runs={where}: no metrics.json with gold_score, win_rate or length was found below; "
            "run rlaif.evaluate first"
        )
    for records in (found.evaluations, found.qualities, found.preference_models):
        records.sort(key=lambda r: (-1 if r.seed is None else r.seed, r.label))
    found.curves = [curve for file in curve_files if (curve := _read_curve(file, found))]
    return found


def _folders(roots: Sequence[Path]) -> Iterator[tuple[Path, Path, list[str]]]:
    """Every folder once, with its root and sorted file names; hidden ones and those set aside are unfinished work."""
    seen: set[Path] = set()
    for root in (existing_dir(root, "runs").resolve() for root in roots):
        for current, folders, files in os.walk(root):
            folder = Path(current)
            finished = (n for n in folders if not (n.startswith(".") or n == SKIPPED or is_set_aside(n)))
            folders[:] = sorted(n for n in finished if folder / n not in seen)
            if folder not in seen:
                seen.add(folder)
                yield root, folder, sorted(files)


def _read_object(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except UserError as error:
        problems.append(str(error))
        return None
    if not isinstance(value, dict):
        problems.append(f"{path}: expected a JSON object")
        return None
    return value


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Lines up to the first broken one, which an interrupted run may leave."""
    lines: list[dict[str, Any]] = []
    try:
        lines.extend(read_jsonl(path, lambda line: line))
    except (UserError, RecursionError) as error:
        problems.append(f"{error}; lines after it are left out")
    return lines


def _read_samples(path: Path, problems: list[str]) -> tuple[dict[str, Sample], Scores]:
    """The first sample of each prompt, and the scores of all."""
    samples: dict[str, tuple[int, Sample]] = {}
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for line in _read_lines(path, problems) if path.is_file() else []:
        completion, prompt_id = line.get("completion"), line.get("prompt_id")
        if not isinstance(completion, str) or prompt_id is None:
            continue
        number, key = round(finite(line.get("sample")) or 0), str(prompt_id)
        if key not in samples or number < samples[key][0]:
            samples[key] = (number, _sample(key, completion, line))
        given = {name: x for name in ("gold_score", "pm_score") if (x := finite(line.get(name))) is not None}
        scores.setdefault(key, {}).setdefault(number, given)
    return {key: sample for key, (_, sample) in samples.items()}, scores


def _sample(prompt_id: str, completion: str, line: Mapping[str, Any]) -> Sample:
    prompt = line.get("prompt")
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    turns = tuple((str(m.get("role", "user")), str(m.get("content", ""))) for m in messages if isinstance(m, dict))
    tokens, reason = finite(line.get("tokens")), line.get("finish_reason")
    return Sample(
        prompt_id,
        turns,
        completion,
        finite(line.get("gold_score")),
        None if tokens is None else round(tokens),
        None if reason is None else str(reason),
    )


def _read_curve(file: Record, found: Collection) -> Curve | None:
    raw = _read_lines(file.folder / "training.jsonl", found.problems)
    lines = tuple({k: x for k, v in line.items() if (x := finite(v)) is not None} for line in raw)
    if not lines:
        return None
    owner = _owner(file, found.evaluations)
    kind = next((str(line["method"]) for line in raw if line.get("method")), None)
    if kind is None:
        kind = _guess_kind(file, lines, owner)
    if kind in ("preference_model", "reward_model"):
        kind = "pm"
    # A preference model shared by several arms is named after its own folder.
    return Curve(kind, owner.name if owner else file.label, owner.seed if owner else None, lines)


def _guess_kind(file: Record, lines: Sequence[Mapping[str, float]], owner: Evaluation | None) -> str:
    if any(part in ("pm", "preference_model", "reward_model") for part in file.folder.parts[-2:]):
        return "pm"
    if "iteration" in lines[0]:
        return "ppo"
    return (owner.text("method") if owner else None) or "training"


def _owner(file: Record, evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The trained row whose evaluation shares the closest parent folder, if there is exactly one such row."""

    trained = [e for e in evaluations if e.root == file.root and e.text("method") != "base"]
    closest = max((_shared_depth(file.folder, e.folder) for e in trained), default=0)
    owners = [e for e in trained if _shared_depth(file.folder, e.folder) == closest]
    return owners[0] if len({(e.name, e.seed) for e in owners}) == 1 else None
