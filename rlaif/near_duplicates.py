"""Clusters of texts that share most of their words: exact, and far from comparing every pair.

Two sets of words (:func:`rlaif.text.words_of`) are near-duplicates if their Jaccard similarity reaches a threshold; a
cluster is what chains of near-duplicates connect. Pairs pass three filters, none of which loses a near-duplicate,
before their words are compared:

- Prefixes (Bayardo et al. 2007; Xiao et al. 2008): with the words of every set sorted from rare to common, similar sets
  share a word among the first few; the first word they share comes so early that enough words can follow it.
- Clusters: two sets that are connected already need no comparison. Of a template that is filled in 100,000 times, one
  text is compared with all.
- Signatures: a word flips one bit. The bits in which two signatures differ are at most the words in which the sets
  differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif.text import words_of

Ints = NDArray[np.int64]

_CELLS = 2**18
"""Pairs compared at once: their intermediate results stay in the cache of a core."""
_FEW = 2**13
"""Words that suggest fewer pairs than this are not worth a step of their own; they are taken together."""
_MANY = 64
"""So many sets of one cluster are compared with the others as one block."""
_SLACK = 1e-6
"""What rounding may cost a bound; too much of it only lets more pairs through to the comparison of words."""


def near_duplicate_clusters(texts: Sequence[str], threshold: float) -> tuple[int, ...]:
    """A cluster number for each text; texts with word-set Jaccard similarity >= threshold share one."""
    return _clusters(tuple(texts), threshold)


# A command asks for the splits of its prompts more than once.
@lru_cache(maxsize=2)
def _clusters(texts: tuple[str, ...], threshold: float) -> tuple[int, ...]:
    number_of: dict[tuple[int, ...], int] = {}
    ids: dict[str, int] = {}
    numbers = []
    for text in texts:
        words = tuple(sorted({ids.setdefault(word, len(ids)) for word in words_of(text)}))
        numbers.append(number_of.setdefault(words, len(number_of)))
    if threshold <= 0 or not number_of:
        return tuple(numbers)
    distinct = _Sets(list(number_of), threshold)
    distinct.connect()
    return tuple(distinct.clusters()[numbers].tolist())


class _Sets:
    """Distinct word sets, from small to large, and the clusters found so far."""

    def __init__(self, sets: list[tuple[int, ...]], threshold: float) -> None:
        self.threshold = threshold
        floor = threshold - 1e-9
        sizes = np.array([len(words) for words in sets])
        words = np.fromiter(itertools.chain.from_iterable(sets), np.int64, sizes.sum())
        self.order = np.argsort(sizes, kind="stable")
        place = np.empty_like(self.order)
        place[self.order] = np.arange(len(sets))
        count = np.bincount(words, minlength=1)
        rarity = np.empty_like(count)
        rarity[np.argsort(count, kind="stable")] = np.arange(len(count))
        # One number says set and word, so one sort brings sets, and in each its words from rare to common, together.
        keys = np.repeat(place, sizes) * len(count) + rarity[words]
        keys.sort()
        owners, self.words = np.divmod(keys, len(count))
        self.sizes = sizes[self.order]
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.parents = np.arange(len(sets))
        self.vocabulary = len(count)
        self.signatures = self._signatures()
        # Similar sets x, y share at least this part of |x| + |y|, and of each of |x| and |y| the part `floor`.
        self.part = max(floor / (1 + floor), 0)
        left = np.repeat(self.sizes, self.sizes) - (np.arange(len(keys)) - self.starts[owners])
        self._index(owners, left, max(floor, 0))

    def _index(self, owners: Ints, left: Ints, floor: float) -> None:
        """For each word the sets that have it in their prefix, and which smaller sets they may be similar to.

        ``left`` is the number of words from this one to the last of its set.
        """
        sizes = self.sizes[owners]
        prefix = left >= np.ceil(floor * sizes - _SLACK)
        by_word = np.argsort(self.words[prefix], kind="stable")
        self.owners, self.left = owners[prefix][by_word], left[prefix][by_word]
        word = self.words[prefix][by_word]
        # As the smaller of two, a set shares more of its words, so a shorter prefix does.
        smaller = np.flatnonzero(self.left >= np.ceil(2 * self.part * self.sizes[self.owners] - _SLACK))
        places = word * len(self.sizes) + self.owners
        least = np.searchsorted(self.sizes, floor * self.sizes[self.owners] - _SLACK)
        self.first = np.searchsorted(places[smaller], word * len(self.sizes) + least)
        self.last = np.searchsorted(places[smaller], places)
        self.smaller = smaller
        self.bounds = np.append(np.flatnonzero(np.diff(word, prepend=-1)), len(word))

    def _signatures(self) -> NDArray[np.uint64]:
        """Bits by set: of each bit whether an odd number of the set's words fall on it."""
        length = int(np.clip(self.sizes.mean() // 32 + 1, 1, 16))
        bits = np.random.default_rng(0).integers(0, 64 * length, self.vocabulary)[self.words]
        signatures = np.zeros((length, len(self.sizes)), np.uint64)
        filled = self.sizes > 0
        for row in range(length):
            masks = np.where(bits // 64 == row, np.uint64(1) << (bits % 64).astype(np.uint64), np.uint64(0))
            if len(masks):
                signatures[row, filled] = np.bitwise_xor.reduceat(masks, self.starts[filled])
        return signatures

    def clusters(self) -> Ints:
        """The cluster of each set, in the order in which the sets were given."""
        clusters = np.empty_like(self.order)
        clusters[self.order] = self._find(np.arange(len(self.order)))
        return clusters

    def connect(self) -> None:
        """Find every cluster."""
        pairs = np.add.reduceat(self.last - self.first, self.bounds[:-1]) if len(self.owners) else np.empty(0, int)
        many = pairs > _FEW
        for start, end in zip(self.bounds[:-1][many], self.bounds[1:][many], strict=True):
            self._connect_word(np.arange(start, end))
        for larger, smaller in self._few(np.flatnonzero(np.repeat(~many, np.diff(self.bounds)))):
            self._connect_pairs(larger, smaller)

    def _few(self, larger: Ints) -> Iterator[tuple[Ints, Ints]]:
        """All pairs that these entries of the index suggest."""
        larger = larger[self.last[larger] > self.first[larger]]
        counts = self.last[larger] - self.first[larger]
        ends = np.cumsum(counts)
        start = 0
        while start < len(larger):
            taken = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + 4 * _CELLS, side="right"))
            some = slice(start, max(taken, start + 1))
            yield np.repeat(larger[some], counts[some]), self.smaller[_ranges(self.first[larger[some]], counts[some])]
            start = some.stop

    def _connect_pairs(self, larger: Ints, smaller: Ints) -> None:
        x, y = self.owners[larger], self.owners[smaller]
        differ = np.zeros(len(x), np.int64)
        for signature in self.signatures:
            differ += np.bitwise_count(signature[x] ^ signature[y])
        near = self._may_be_near(larger, smaller, differ)
        self._compare(x[near], y[near])

    def _may_be_near(self, larger: Ints, smaller: Ints, differ: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether enough words can follow these entries of the index, and signatures so different be near."""
        sizes = self.sizes[self.owners[larger]] + self.sizes[self.owners[smaller]]
        early = np.minimum(self.left[larger], self.left[smaller]) >= self.part * sizes - _SLACK
        return early & (differ <= (1 - 2 * self.part) * sizes + _SLACK)

    def _connect_word(self, larger: Ints) -> None:
        """Compare the sets that share a word, which are many, in blocks."""
        smaller = self.smaller[self.first[larger].min() : self.last[larger].max()]
        step = max(1, _CELLS // len(smaller))
        while len(larger):
            clusters = self._find(self.owners[larger])
            by_cluster = np.argsort(clusters, kind="stable")
            larger, clusters = larger[by_cluster], clusters[by_cluster]
            _, starts, counts = np.unique(clusters, return_index=True, return_counts=True)
            for start, count in zip(starts[counts >= _MANY], counts[counts >= _MANY], strict=True):
                self._connect_cluster(larger[start : start + count], smaller)
            rest = larger[np.repeat(counts < _MANY, counts)]
            self._connect_block(rest[:step], smaller)
            larger, step = rest[step:], 2 * step

    def _connect_cluster(self, larger: Ints, smaller: Ints) -> None:
        """Compare the sets of one cluster with those outside of it, fewer whenever the cluster has grown."""
        step = 1
        while len(larger):
            cluster = self._find(self.owners[larger[:1]])
            smaller = smaller[self._find(self.owners[smaller]) != cluster]
            self._connect_block(larger[:step], smaller)
            larger, step = larger[step:], 2 * step

    def _connect_block(self, larger: Ints, smaller: Ints) -> None:
        if not len(larger) or not len(smaller):
            return
        # The larger they are, the more are smaller: most of the blocks need not compare with all.
        signatures = self.signatures[:, self.owners[smaller]]
        rows = max(1, _CELLS // len(smaller))
        for start in range(0, len(larger), rows):
            some = larger[start : start + rows]
            x = self.owners[some]
            end = int(np.searchsorted(smaller, some.max()))
            differ = np.zeros((len(some), end), np.uint16)
            for mine, theirs in zip(self.signatures[:, x], signatures[:, :end], strict=True):
                differ += np.bitwise_count(mine[:, None] ^ theirs)
            # The other is no larger, or the two meet in its row.
            limits = np.minimum((1 - 2 * self.part) * 2 * self.sizes[x] + _SLACK, 2**16 - 1).astype(np.uint16)
            row, column = np.divmod(np.flatnonzero(differ <= limits[:, None]), max(end, 1))
            near = self._may_be_near(some[row], smaller[column], differ[row, column])
            row, column = row[near], column[near]
            self._compare(x[row], self.owners[smaller[column]])

    def _compare(self, x: Ints, y: Ints) -> None:
        """Connect those pairs that are near-duplicates."""
        budget = _FEW
        while True:
            apart = self._find(x) != self._find(y)
            x, y = x[apart], y[apart]
            if not len(x):
                return
            # Few at first: what they connect need not be compared again.
            words = np.cumsum(self.sizes[x] + self.sizes[y])
            count = max(1, int(np.searchsorted(words, budget, side="right")))
            budget = min(2 * budget, 8 * _CELLS)
            shared = self._shared(x[:count], y[:count])
            union = self.sizes[x[:count]] + self.sizes[y[:count]] - shared
            similar = shared / union >= self.threshold - 1e-9
            self._unite(x[:count][similar], y[:count][similar])
            x, y = x[count:], y[count:]

    def _shared(self, x: Ints, y: Ints) -> Ints:
        """How many words the sets of each pair share: those that are there twice."""
        owners = np.concatenate([x, y])
        pair = np.repeat(np.tile(np.arange(len(x)), 2), self.sizes[owners])
        words = self.words[_ranges(self.starts[owners], self.sizes[owners])]
        keys = pair * self.vocabulary + words
        keys.sort()
        return np.bincount(keys[1:][keys[1:] == keys[:-1]] // self.vocabulary, minlength=len(x))

    def _find(self, sets: Ints) -> Ints:
        """The clusters of these sets: each the number of its smallest set."""
        found = self.parents[sets]
        while True:
            above = self.parents[found]
            if np.array_equal(above, found):
                self.parents[sets] = found
                return found
            found = above

    def _unite(self, x: Ints, y: Ints) -> None:
        while len(x):
            x, y = self._find(x), self._find(y)
            x, y = np.maximum(x, y), np.minimum(x, y)
            np.minimum.at(self.parents, x, y)
            apart = x != y
            x, y = x[apart], y[apart]


def _ranges(starts: Ints, counts: Ints) -> Ints:
    """``start, start + 1, ...`` of each range, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)
