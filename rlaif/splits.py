"""Train, validation and test: by prompt, near-duplicates together, the same in every stage.

Clusters of near-duplicates are ordered by a hash of their text and cut in two places. The places are those that the
shares name, so that a prompt lands in the same split in every file, unless that would leave a split more than a tenth
off its share, as it would where prompts are few: then the cut moves until it does not.
"""

from __future__ import annotations

import hashlib
import logging
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlaif.config import DataConfig, Split
from rlaif.near_duplicates import near_duplicate_clusters
from rlaif.records import Prompt, UserError, bounded_examples, read_prompts
from rlaif.text import words_of

log = logging.getLogger("rlaif")

_TOLERANCE = 0.1
"""How far a split may be off its share, as a part of it."""


def assign_splits(prompts: Sequence[Prompt], data: DataConfig) -> dict[str, Split]:
    """The split of each prompt id; warns where there are too few prompts for all three."""
    splits, groups = _splits(prompts, data)
    wanted = {Split.validation: data.validation_fraction, Split.test: data.test_fraction}
    missing = [split.value for split, share in wanted.items() if share > 0 and split not in splits.values()]
    if missing:
        log.warning(
            "%d prompts in %d groups of near-duplicates, which stay together: nothing falls into %s",
            len(prompts),
            groups,
            ", ".join(missing),
        )
    return splits


def validation_ids(prompts: Sequence[Prompt], data: DataConfig) -> frozenset[str]:
    """The ids of those that fall into the validation split; none where there are too few prompts."""
    splits, _ = _splits(prompts, data)
    return frozenset(name for name, split in splits.items() if split is Split.validation)


def _splits(prompts: Sequence[Prompt], data: DataConfig) -> tuple[dict[str, Split], int]:
    """The split of each prompt id, and the number of clusters."""
    clusters = near_duplicate_clusters([prompt.text for prompt in prompts], data.near_duplicate_threshold)
    keys: dict[int, str] = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        text = " ".join(words_of(prompt.text))
        keys[cluster] = min(keys.get(cluster, text), text)
    points = {cluster: _point(key) for cluster, key in keys.items()}
    order = sorted(points, key=lambda cluster: (points[cluster], keys[cluster]))
    test, validation = _sizes(sorted(points.values()), data)
    split_of = dict.fromkeys(order, Split.train)
    split_of |= dict.fromkeys(order[:test], Split.test)
    split_of |= dict.fromkeys(order[test : test + validation], Split.validation)
    return {prompt.prompt_id: split_of[cluster] for prompt, cluster in zip(prompts, clusters, strict=True)}, len(points)


def _sizes(points: Sequence[float], data: DataConfig) -> tuple[int, int]:
    """How many clusters go into test and validation; points are sorted. Train comes first, then test."""
    n, both = len(points), data.test_fraction + data.validation_fraction
    test = min(_size(bisect_left(points, data.test_fraction), data.test_fraction, n), n - 1)
    if data.validation_fraction > 0:
        test = min(test, max(1, n - 2))
    validation = _size(bisect_left(points, both) - test, data.validation_fraction, n)
    return test, min(validation, n - 1 - test)


def _size(found: int, share: float, n: int) -> int:
    """The number nearest to what the hashes give that is within tolerance of the share, and no empty split."""
    if share <= 0:
        return 0
    exact = max(1, round(share * n))
    least = min(exact, math.ceil((1 - _TOLERANCE) * share * n))
    most = max(exact, math.floor((1 + _TOLERANCE) * share * n))
    return min(max(found, least), most)


def read_splits(file: Path, data: DataConfig) -> tuple[list[Prompt], dict[str, Split]]:
    """The prompts of a file that ``data.max_prompts`` leaves, and the split of each prompt id of the file.

    The whole file is split, so that another ``max_prompts`` moves no prompt into another split.
    """
    prompts = read_prompts(file)
    splits = assign_splits(prompts, data)
    return _first(prompts, splits, data.max_prompts), splits


def _first(prompts: Sequence[Prompt], splits: dict[str, Split], most: int | None) -> list[Prompt]:
    """So many prompts: the first of each split, in proportion, but of each at least one."""
    if most is None or most >= len(prompts):
        return list(prompts)
    counts, left = Counter(splits.values()), Counter[Split]()
    for split in (Split.test, Split.validation):
        if counts[split]:
            left[split] = min(max(1, round(most * counts[split] / len(prompts))), most - left.total() - 1)
    left[Split.train] = most - left.total()
    chosen = []
    for prompt in prompts:
        split = splits[prompt.prompt_id]
        if left[split]:
            left[split] -= 1
            chosen.append(prompt)
    return chosen


def read_split(file: Path, data: DataConfig, split: Split) -> list[Prompt]:
    """The prompts of one split of a prompts file.

    Raises:
        UserError: if there is none.
    """
    prompts = read_prompts(file)
    splits, groups = _splits(prompts, data)
    chosen = [prompt for prompt in _first(prompts, splits, data.max_prompts) if splits[prompt.prompt_id] is split]
    if not chosen:
        raise UserError(
            f"{file}: no prompt falls into the {split.value} split: {len(prompts)} prompts make {groups} groups of "
            f"near-duplicates, which stay together (data.validation_fraction={data.validation_fraction}, "
            f"data.test_fraction={data.test_fraction}, data.max_prompts={data.max_prompts}); give more prompts"
        )
    return chosen


def check_no_leak(prompts: Sequence[Prompt], splits: dict[str, str], threshold: float) -> None:
    """Refuse splits (a user's own) that put near-duplicate prompts on both sides.

    Raises:
        UserError: naming some of the prompts.
    """
    clusters = near_duplicate_clusters([prompt.text for prompt in prompts], threshold)
    seen: dict[int, tuple[str, str]] = {}
    leaks = []
    for prompt, cluster in zip(prompts, clusters, strict=True):
        split = splits[prompt.prompt_id]
        name, other = seen.setdefault(cluster, (prompt.prompt_id, split))
        if other != split:
            leaks.append(f"{name} ({other}) and {prompt.prompt_id} ({split})")
    if leaks:
        raise UserError(
            f"the given splits put near-duplicate prompts on both sides: {bounded_examples(leaks, 3)}; "
            "remove `split` from the lines and they will be split for you"
        )


def shared(held_out: Sequence[Prompt], others: Sequence[Prompt], threshold: float) -> tuple[list[int], list[int]]:
    """The places of held-out prompts and of other prompts that are near-duplicates of each other, as splits see it."""
    clusters = near_duplicate_clusters([prompt.text for prompt in (*held_out, *others)], threshold)
    ours, theirs = clusters[: len(held_out)], clusters[len(held_out) :]
    both = set(ours) & set(theirs)
    return [i for i, cluster in enumerate(ours) if cluster in both], [
        i for i, cluster in enumerate(theirs) if cluster in both
    ]


def _point(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
