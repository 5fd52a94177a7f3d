"""A file of candidates: checked before anything is asked, and split."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlaif.config import DataConfig, Split
from rlaif.records import Candidates, Prompt, UserError, content_hash, iterate_candidates
from rlaif.splits import assign_splits, check_no_leak

log = logging.getLogger("rlaif")

_LEAK_CHECK = 20_000
"""Up to so many prompts, splits of a user's own are checked for near-duplicates on both sides."""


@dataclass(frozen=True)
class CandidatesFile:
    """A checked file of candidates. Call it to read it anew, line by line, every line with its split."""

    path: Path
    splits: Mapping[str, str] | None
    """By prompt id; ``None``: the lines have their own."""
    sizes: Mapping[int, int]
    """Number of prompts by number of candidates."""
    digest: str
    """Hash of the prompts and completions in their order, whatever else the lines say."""

    def __call__(self) -> Iterator[Candidates]:
        for line in iterate_candidates(self.path):
            yield line if self.splits is None else replace(line, split=self.splits[line.prompt.prompt_id])


def open_candidates(file: Path, data: DataConfig) -> CandidatesFile:
    """Check every line of a file of candidates before anything is asked, and split it if it is not.

    Raises:
        UserError: naming the file and what is wrong.
    """
    prompts: list[Prompt] = []
    splits: dict[str, str] = {}
    sizes: Counter[int] = Counter()
    digest = ""
    for line in iterate_candidates(file):
        sizes[len(line.candidates)] += 1
        shown = [(candidate.candidate_id, candidate.completion) for candidate in line.candidates]
        digest = content_hash(digest, line.prompt.prompt_id, line.prompt.messages, shown)
        if line.split is not None and line.split not in list(Split):
            raise UserError(f"{file}: unknown split {line.split!r}; there are {', '.join(Split)}")
        if bool(line.split) != bool(splits) and prompts:
            raise UserError(f"{file}: some lines have a split and some have none; all or none must")
        if line.split is None or len(prompts) < _LEAK_CHECK:
            prompts.append(line.prompt)
            if line.split is not None:
                splits[line.prompt.prompt_id] = line.split
    if not splits:
        assigned = assign_splits(prompts, data)
        return CandidatesFile(file, {name: split.value for name, split in assigned.items()}, sizes, digest)
    if len(prompts) < sizes.total():
        log.info("%s: only the first %d prompts are checked for near-duplicates across splits", file, len(prompts))
    check_no_leak(prompts, splits, data.near_duplicate_threshold)
    return CandidatesFile(file, None, sizes, digest)
