"""Train, validation and test: by prompt, near-duplicates together, the same in every stage.

A prompt's split depends only on the text of its cluster, so the same prompt lands in the same split in every file
that was split with the same fractions, and adding prompts moves none of the others; only a new near-duplicate of a
prompt can move that prompt's cluster, because it changes the cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from rlaif.config import DataConfig, Split
from rlaif.near_duplicates import near_duplicate_clusters
from rlaif.records import Prompt, UserError, bounded_examples, read_prompts
from rlaif.words import words_of


def assign_splits(prompts: Sequence[Prompt], data: DataConfig) -> dict[str, Split]:
    """The split of each prompt id.

    Raises:
        UserError: if a split that was asked for gets no prompt.
    """
    splits, groups = _splits(prompts, data)
    present = set(splits.values())
    wanted = {Split.train: 1.0, Split.validation: data.validation_fraction, Split.test: data.test_fraction}
    missing = [split.value for split, share in wanted.items() if share > 0 and split not in present]
    if missing:
        raise UserError(
            f"{len(prompts)} prompts in {groups} groups are too few to split: nothing falls into "
            f"{', '.join(missing)}; give more prompts or change data.validation_fraction / data.test_fraction"
        )
    return splits


def validation_ids(prompts: Sequence[Prompt], data: DataConfig) -> frozenset[str]:
    """The ids of those that fall into the validation split; none where all others would, or too few prompts are there.

    A prompt of a preference dataset falls where it falls in a file of prompts.
    """
    splits, _ = _splits(prompts, data)
    held_out = frozenset(name for name, split in splits.items() if split is Split.validation)
    return held_out if len(held_out) < len(splits) else frozenset()


def _splits(prompts: Sequence[Prompt], data: DataConfig) -> tuple[dict[str, Split], int]:
    """The split of each prompt id, and the number of clusters."""
    clusters = near_duplicate_clusters([prompt.text for prompt in prompts], data.near_duplicate_threshold)
    keys: dict[int, str] = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        text = " ".join(words_of(prompt.text))
        keys[cluster] = min(keys.get(cluster, text), text)
    points = {cluster: _point(key) for cluster, key in keys.items()}
    splits = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        point = points[cluster]
        if point < data.test_fraction:
            split = Split.test
        elif point < data.test_fraction + data.validation_fraction:
            split = Split.validation
        else:
            split = Split.train
        splits[prompt.prompt_id] = split
    return splits, len(points)


def read_split(file: Path, data: DataConfig, split: Split) -> list[Prompt]:
    """The prompts of one split of a prompts file.

    Raises:
        UserError: if there is none.
    """
    prompts = read_prompts(file)[: data.max_prompts]
    splits = assign_splits(prompts, data)
    chosen = [prompt for prompt in prompts if splits[prompt.prompt_id] is split]
    if not chosen:
        raise UserError(f"{file}: no prompt falls into the {split.value} split")
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


def _point(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
