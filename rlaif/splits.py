"""Train, validation and test: by prompt, near-duplicates together, the same in every stage.

A prompt's split depends only on the text of its cluster, so the same prompt lands in the same split in every file
that was split with the same fractions, and adding prompts moves none of the others; only a new near-duplicate of a
prompt can move that prompt's cluster, because it changes the cluster.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rlaif.config import DataConfig, Split
from rlaif.records import Prompt, UserError, bounded_examples, read_prompts

_WORD = re.compile(r"\w+")


def assign_splits(prompts: Sequence[Prompt], data: DataConfig) -> dict[str, Split]:
    """The split of each prompt id.

    Raises:
        UserError: if a split that was asked for gets no prompt.
    """
    clusters = near_duplicate_clusters([prompt.text for prompt in prompts], data.near_duplicate_threshold)
    keys: dict[int, str] = {}
    for prompt, cluster in zip(prompts, clusters, strict=True):
        text = " ".join(_words(prompt.text))
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
    present = set(splits.values())
    wanted = {Split.train: 1.0, Split.validation: data.validation_fraction, Split.test: data.test_fraction}
    missing = [split.value for split, share in wanted.items() if share > 0 and split not in present]
    if missing:
        raise UserError(
            f"{len(prompts)} prompts in {len(points)} groups are too few to split: nothing falls into "
            f"{', '.join(missing)}; give more prompts or change data.validation_fraction / data.test_fraction"
        )
    return splits


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


def near_duplicate_clusters(texts: Sequence[str], threshold: float) -> list[int]:
    """A cluster number for each text; texts with word-set Jaccard similarity >= threshold share one.

    Exact: candidates come from an inverted index under the prefix filter (Bayardo et al. 2007): two sets that
    similar must share one of their rarest words.
    """
    sets = [frozenset(_words(text)) for text in texts]
    parent = list(range(len(sets)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[frozenset[str], int] = {}
    frequency: dict[str, int] = defaultdict(int)
    for index, words in enumerate(sets):
        if words in first_with:
            parent[find(index)] = find(first_with[words])
        else:
            first_with[words] = index
            for word in words:
                frequency[word] += 1
    index_of: dict[str, list[int]] = defaultdict(list)
    for index in sorted(first_with.values(), key=lambda i: len(sets[i])):
        words = sets[index]
        if not words or threshold <= 0:
            continue
        rare = sorted(words, key=lambda word: (frequency[word], word))
        prefix = rare[: len(words) - _ceil(threshold * len(words)) + 1]
        others = {other for word in prefix for other in index_of[word]}
        for other in others:
            if len(sets[other]) < threshold * len(words) - 1e-9 or find(other) == find(index):
                continue
            shared = len(words & sets[other])
            if shared / (len(words) + len(sets[other]) - shared) >= threshold - 1e-9:
                parent[find(index)] = find(other)
        for word in prefix:
            index_of[word].append(index)
    return [find(index) for index in range(len(sets))]


def _ceil(value: float) -> int:
    return -int(-(value - 1e-9) // 1)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _point(key: str) -> float:
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
