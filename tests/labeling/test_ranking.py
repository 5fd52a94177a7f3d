"""Bradley-Terry scores, doubts about an order, and what they make of pair labels."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.labeling.aggregate import PairLabel
from rlaif.labeling.ranking import bradley_terry, doubts, ranked_pairs, ranks, scores_of, uncertain_pairs


def pair(one, other, logit, principles=None):
    return PairLabel("p", one, other, logit, principles or {})


def test_one_pair_by_hand():
    # s_0 = -s_1 = d / 2 with sigmoid(d) - sigmoid(2) + ridge * d / 2 = 0. With ridge = 0.1 and d = 1.5:
    # 0.817574 - 0.880797 + 0.075 = 0.011777; d = 1.4: 0.802184 - 0.880797 + 0.07 = -0.008613; root near 1.4424.
    one, other = bradley_terry(2, [(0, 1, 2.0)], ridge=0.1)
    assert one == pytest.approx(-other, abs=1e-9)
    assert one - other == pytest.approx(1.4424, abs=2e-3)
    # Almost no prior: the label itself.
    one, other = bradley_terry(2, [(0, 1, 2.0)], ridge=1e-9)
    assert one - other == pytest.approx(2.0, abs=1e-6)


def test_a_cycle_is_a_tie():
    assert bradley_terry(3, [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)]) == pytest.approx([0, 0, 0], abs=1e-9)


def test_opposite_verdicts_average_in_probability():
    # The loss of two verdicts on a pair is that of their mean probability: (0.9 + 0.5) / 2 = 0.7, logit 0.847298.
    one, other = bradley_terry(2, [(0, 1, math.log(9)), (1, 0, 0.0)], ridge=1e-9)
    assert one - other == pytest.approx(0.847298, abs=1e-5)


def test_nothing_known():
    assert bradley_terry(3, []) == [0, 0, 0]


def test_scores_are_finite_for_separable_verdicts():
    # The loser of every comparison would go to minus infinity without the prior.
    scores = bradley_terry(3, [(0, 1, 1e3), (0, 2, 1e3), (1, 2, 1e3)])
    assert scores[0] > scores[1] > scores[2]
    assert max(map(abs, scores)) < 20


utilities = st.lists(st.floats(-3, 3), min_size=2, max_size=6)


@given(utilities)
def test_planted_utilities_are_recovered(values):
    verdicts = [(i, j, values[i] - values[j]) for i, j in itertools.combinations(range(len(values)), 2)]
    mean = sum(values) / len(values)
    assert bradley_terry(len(values), verdicts, 1e-7) == pytest.approx([v - mean for v in values], abs=1e-3)


@given(utilities, st.randoms(), st.floats(0, 2))
def test_the_order_of_verdicts_and_names_does_not_matter(values, rng, noise):
    verdicts = [
        (i, j, values[i] - values[j] + rng.gauss(0, noise)) for i, j in itertools.combinations(range(len(values)), 2)
    ]
    scores = bradley_terry(len(values), verdicts)
    place = list(range(len(values)))
    rng.shuffle(place)
    moved = [
        (place[i], place[j], logit) if rng.random() < 0.5 else (place[j], place[i], -logit) for i, j, logit in verdicts
    ]
    rng.shuffle(moved)
    found = bradley_terry(len(values), moved)
    assert [found[place[i]] for i in range(len(values))] == pytest.approx(scores, abs=1e-6)


def test_doubt_by_hand():
    # One verdict with noise 1: the difference has variance 2 / (ridge + 2) -> 1, so the doubt is Phi(-d).
    found = doubts(2, [(0, 1, 1.0)], ridge=1e-9)
    assert found[0, 1] == pytest.approx(0.158655, abs=1e-4)
    # Two steps away, the variance is 2: Phi(-2 / sqrt(2)) = 0.0786.
    found = doubts(3, [(0, 1, 1.0), (1, 2, 1.0)], ridge=1e-9)
    assert found[0, 2] == pytest.approx(0.078650, abs=1e-4)
    # No path: the prior's variance is all there is.
    found = doubts(3, [(0, 1, 1.0)])
    assert found[0, 2] == pytest.approx(0.5, abs=0.02)
    assert np.allclose(found, found.T)


def test_what_is_asked_next():
    # Nothing known: disjoint pairs.
    assert uncertain_pairs(4, [], set()) == [(0, 1), (2, 3)]
    assert uncertain_pairs(4, [], set(), limit=1) == [(0, 1)]
    # What is not connected goes first; 0 > 1 and 2 > 3 are known.
    known = [(0, 1, 3.0), (2, 3, 3.0)]
    # One of the four pairs between them is enough for this round.
    [pair] = uncertain_pairs(4, known, {(0, 1), (2, 3)})
    assert pair in {(0, 2), (1, 3)}
    # 1 and 2 are equal, but 3 is not connected: it goes first.
    known = [(0, 1, 3.0), (0, 2, 3.0)]
    assert 3 in uncertain_pairs(4, known, {(0, 1), (0, 2)})[0]
    # 0 >> 1 >> 2 implies 0 > 2, which is not asked.
    assert uncertain_pairs(3, [(0, 1, 4.0), (1, 2, 4.0)], {(0, 1), (1, 2)}) == []
    # Close scores are asked.
    assert uncertain_pairs(3, [(0, 1, 4.0), (0, 2, 4.1)], {(0, 1), (0, 2)}) == [(1, 2)]


def test_ranks_share_places():
    assert ranks({"a": 1.0, "b": 2.0, "c": 1.0, "d": 0.0}) == {"b": 1, "a": 2, "c": 2, "d": 4}


def test_ranked_pairs():
    given_pairs = [replace(pair("a", "b", 2.0, {"k": 2.0}), missing_weight=0.25), pair("b", "c", 1.0, {"k": 1.0})]
    found, missing = ranked_pairs("p", ["c", "b", "a", "d"], given_pairs)
    by_name = {(row.one, row.other): row for row in found}
    # A chain fits exactly, up to the prior; nothing is known about d.
    assert missing == 3
    assert by_name["a", "b"].logit == pytest.approx(2.0, abs=0.05)
    assert by_name["a", "c"].logit == pytest.approx(3.0, abs=0.08)
    assert {name: row.inferred for name, row in by_name.items()} == {
        ("a", "b"): False,
        ("a", "c"): True,
        ("b", "c"): False,
    }
    assert (by_name["a", "b"].principles, by_name["a", "c"].principles) == ({"k": 2.0}, {})
    # Of a pair that was inferred, all of the weight is missing.
    assert [row.missing_weight for row in found] == [0.25, 1.0, 0.0]


def test_groups_that_nothing_connects_are_not_compared():
    found, missing = ranked_pairs("p", list("abcd"), [pair("a", "b", 1.0), pair("c", "d", 1.0)])
    assert [(row.one, row.other) for row in found] == [("a", "b"), ("c", "d")]
    assert missing == 4
    assert ranked_pairs("p", ["a", "b"], []) == ([], 1)


def test_one_pair_is_its_own_ranking():
    assert scores_of([pair("a", "b", -3.0)]) == {"a": -1.5, "b": 1.5}


@given(st.lists(st.floats(-8, 8), min_size=1, max_size=5), st.integers(2, 4), st.floats(-4, 4))
def test_tied_candidates_stay_exactly_tied(others, tied, level):
    """Candidates with the same labels have scores that only rounding tells apart."""
    names = [f"t{place}" for place in range(tied)] + [f"x{place}" for place in range(len(others))]
    values = [level] * tied + others
    pairs = [pair(names[i], names[j], values[i] - values[j]) for i, j in itertools.combinations(range(len(names)), 2)]
    found, _ = ranked_pairs("p", names, pairs)
    equal = [label.logit for label in found if label.one[0] == label.other[0] == "t"]
    assert equal == [0.0] * (tied * (tied - 1) // 2)
