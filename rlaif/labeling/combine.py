"""Several labelers' labels of the same candidates -> one label of each pair, and how far the labelers agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlaif.config import LabelingConfig
from rlaif.evaluation.statistics import ClusteredMean
from rlaif.folders import PROVENANCE
from rlaif.labeling.aggregate import Calibration, PairLabel, combine, or_tie
from rlaif.labeling.calibration import read_calibration
from rlaif.records import Candidates, Label, UserError, existing_dir, existing_file, read_json, read_jsonl

LABELS = "labels.jsonl"


@dataclass(frozen=True)
class Source:
    """An earlier labeling run: who made its labels, and how its verdicts become pair labels."""

    folder: Path
    labeler: str
    weight: float
    principles: dict[str, float]
    config: LabelingConfig
    calibration: Calibration


def open_source(folder: str, weight: float, candidates: str, key: str = "combine") -> Source:
    """Check a folder of ``rlaif.label``.

    Args:
        folder: as the user gave it.
        weight: of its logits.
        candidates: hash of the candidates that it must have labelled.
        key: the setting that names the folder.

    Raises:
        UserError: naming the folder and what is wrong.
    """
    path = existing_dir(folder, key)
    existing_file(path / LABELS, key)
    quality, provenance = read_json(path / "quality.json"), read_json(path / PROVENANCE)
    if "principles" not in quality or "candidates" not in quality:
        raise UserError(
            f"{key}={folder}: its quality.json does not say which principles and candidates it is of; run "
            "rlaif.label on that folder again (nothing is asked twice)"
        )
    if quality["candidates"] != candidates:
        raise UserError(f"{key}={folder}: labels other candidates than candidates=")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(LabelingConfig), provenance["config"]["labeling"])
        config = OmegaConf.to_object(settings)
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        raise UserError(f"{path / PROVENANCE}: not that of a labeling run ({' '.join(str(error).split())})") from None
    assert isinstance(config, LabelingConfig)
    return Source(path, str(quality["labeler"]), weight, quality["principles"], config, read_calibration(path))


class Combination:
    """Labels of several runs, read in step, prompt by prompt.

    A pair's logit is the mean of the labelers' (each with its own temperature and bias) by weight, that is the
    logarithmic opinion pool (Genest and Zidek 1986), and so is its missing weight. Only pairs that every labeler
    labelled have one.
    """

    def __init__(self, lines: Iterable[Candidates], sources: Sequence[Source]) -> None:
        self.lines, self.sources = lines, sources
        self.dropped: Counter[str] = Counter()
        self._agreement = {pair: ClusteredMean() for pair in itertools.combinations(range(len(sources)), 2)}

    def __iter__(self) -> Iterator[tuple[Candidates, list[Label], list[PairLabel]]]:
        """Each prompt with all verdicts on it, labeler by labeler, and its combined pair labels.

        Raises:
            UserError: where a folder's labels are not those of the candidates.
        """
        groups = [_by_prompt(source.folder / LABELS) for source in self.sources]
        for number, line in enumerate(self.lines):
            labels: list[Label] = []
            found: list[dict[tuple[str, str], PairLabel]] = []
            for source, group in zip(self.sources, groups, strict=True):
                name, own = next(group, (None, []))
                if name != line.prompt.prompt_id:
                    raise UserError(
                        f"{source.folder / LABELS}: expected labels of prompt {line.prompt.prompt_id!r} next, found "
                        f"{name!r}; the file is not as rlaif.label wrote it"
                    )
                pairs, _ = combine(own, source.principles, source.config, source.calibration)
                found.append({(pair.one, pair.other): pair for pair in pairs})
                labels += own
            shared = [pair for pair in found[0] if all(pair in others for others in found)]
            self.dropped["not_by_all"] += len({pair for others in found for pair in others}) - len(shared)
            self._count(found, number)
            yield line, labels, [self._mean([others[pair] for others in found]) for pair in shared]

    def _mean(self, pairs: Sequence[PairLabel]) -> PairLabel:
        """One pair as each labeler sees it -> their weighted mean; principles by name, over those who asked it."""
        weights = [source.weight for source in self.sources]

        def mean(values: Sequence[tuple[float, float]]) -> float:
            return sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)

        names = dict.fromkeys(name for pair in pairs for name in pair.principles)
        by_principle = {
            name: mean(
                [(w, pair.principles[name]) for w, pair in zip(weights, pairs, strict=True) if name in pair.principles]
            )
            for name in names
        }
        logit = mean([(weight, pair.logit) for weight, pair in zip(weights, pairs, strict=True)])
        missing = mean([(weight, pair.missing_weight) for weight, pair in zip(weights, pairs, strict=True)])
        first = pairs[0]
        return PairLabel(first.prompt_id, first.one, first.other, or_tie(logit), by_principle, missing_weight=missing)

    def _count(self, found: Sequence[dict[tuple[str, str], PairLabel]], prompt: int) -> None:
        for (one, other), mean in self._agreement.items():
            for pair in found[one].keys() & found[other].keys():
                left, right = found[one][pair].logit, found[other][pair].logit
                if left and right:
                    mean.add(float((left > 0) == (right > 0)), prompt)

    @property
    def labeler(self) -> str:
        """Short name for tables and labels."""
        return f"combined({', '.join(source.labeler for source in self.sources)})"

    def figures(self) -> dict[str, Any]:
        """Who was combined, and how often each two of them take the same side, after all prompts were taken."""
        agreement = [
            {
                "one": str(self.sources[one].folder),
                "other": str(self.sources[other].folder),
                **estimate.flat("agreement"),
            }
            for (one, other), mean in self._agreement.items()
            if (estimate := mean.estimate()) is not None
        ]
        labelers = [
            {
                "folder": str(source.folder),
                "labeler": source.labeler,
                "weight": source.weight,
                **vars(source.calibration),
            }
            for source in self.sources
        ]
        return {
            "mode": "combined",
            "labelers": labelers,
            "between_labelers": agreement,
        }


def _by_prompt(file: Path) -> Iterator[tuple[str, list[Label]]]:
    """The labels of one prompt after the other."""

    def parse(line: dict[str, Any]) -> Label:
        label = Label.from_json(line)
        if label.method in ("votes", "text") and label.verdict is not None and label.replies is None:
            raise ValueError("read from replies by an earlier version; run rlaif.label on that folder again")
        return label

    for name, labels in itertools.groupby(read_jsonl(file, parse), lambda label: label.prompt_id):
        yield name, list(labels)
