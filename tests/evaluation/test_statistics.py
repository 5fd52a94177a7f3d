"""Estimates, intervals and calibration agree with what can be worked out."""

import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rlaif.evaluation.statistics import (
    Estimate,
    clustered_difference,
    clustered_mean,
    clustered_share,
    expected_calibration_error,
    paired_gain,
    pairs_agreement,
)


def test_the_interval_of_few_symmetric_values_is_students():
    # Without skewness: t s / sqrt(n), with t = 12.706 for one degree of freedom, 4.303 for two, 2.776 for four.
    for values, half in (([0, 2], 12.706), ([-1, 0, 1], 4.303 / 3**0.5), ([-2, -1, 0, 1, 2], 2.776 * 0.5**0.5)):
        estimate = clustered_mean(values)
        assert (estimate.value, estimate.n) == (sum(values) / len(values), len(values))
        assert estimate.high - estimate.value == pytest.approx(half, rel=5e-3)
        assert estimate.value - estimate.low == pytest.approx(half, rel=5e-3)


def test_the_interval_of_many_values_is_normal():
    data = np.random.default_rng(0).normal(3, 2, 10_000)
    estimate = clustered_mean(data)
    error = 1.96 * data.std() / 100
    assert estimate.value == pytest.approx(data.mean())
    assert estimate.high - estimate.value == pytest.approx(error, rel=0.01)
    assert estimate.value - estimate.low == pytest.approx(error, rel=0.01)


def test_skewed_values_reach_further_to_their_long_side():
    # Deviations -1, -1, -1, 3: s = 2, skewness 6 / 3^1.5 = 1.1547, t / 2 = 1.591. Hall's inverse at +-1.591 is
    # 2.598 (cbrt(1 + 1.1547 (+-1.591 - 0.0481)) - 1) = 1.056 and -5.100.
    estimate = clustered_mean([0, 0, 0, 4])
    assert estimate.low == pytest.approx(1 - 2 * 1.056, abs=0.02)
    assert estimate.high == pytest.approx(1 + 2 * 5.100, abs=0.04)
    # A length is never negative.
    assert clustered_mean([0, 0, 0, 4], least=0.0) == Estimate(1.0, 4, 0.0, estimate.high)
    mirrored = clustered_mean([0, 0, 0, -4])
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))


DRAWS = {
    # How values are drawn, their mean, and the least share of intervals of 20 that must hold it.
    "normal": (lambda rng, n: rng.normal(size=n), 0.0, 0.935),
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0, 0.93),
    "lognormal": (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5), 0.9),
    "often no difference": (lambda rng, n: np.where(rng.random(n) < 0.6, 0, rng.normal(0.3, 0.4, n)), 0.12, 0.92),
    # Four of twenty prompts cannot tell the spread.
    "mostly no difference": (lambda rng, n: np.where(rng.random(n) < 0.8, 0, rng.normal(0.3, 0.4, n)), 0.06, 0.86),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_interval_of_a_mean_holds_it_nineteen_times_in_twenty(name):
    """Percentile bootstraps of 20 lognormal values held it in 85 %. The standard error here is about half a percent."""
    draw, true, least = DRAWS[name]
    rng = np.random.default_rng(1)
    for n in (20, 35):
        estimates = [clustered_mean(draw(rng, n).tolist()) for _ in range(2000)]
        assert least <= sum(estimate.low <= true <= estimate.high for estimate in estimates) / 2000 <= 0.97, n


def test_the_interval_of_a_mean_knows_clusters():
    """Four values a cluster that share most of their noise."""
    rng = np.random.default_rng(2)
    clusters, hits = np.repeat(np.arange(30), 4).tolist(), 0
    for _ in range(1000):
        values = np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120)
        estimate = clustered_mean(values.tolist(), clusters)
        hits += estimate.low <= 0 <= estimate.high
    assert 0.93 <= hits / 1000 <= 0.97
    assert estimate.n == 30


def test_clusters_of_unlike_size():
    # The value is the mean of all observations, not of cluster means: (1 + 1 + 1 + 5) / 4 = 2.
    estimate = clustered_mean([1, 1, 1, 5], ["a", "a", "a", "b"])
    assert (estimate.value, estimate.n) == (2.0, 2)


def test_one_cluster_says_nothing_about_spread():
    assert clustered_mean([1.0, 2.0], ["a", "a"]) == Estimate(1.5, 1, float("-inf"), float("inf"))
    assert clustered_share([1.0, 0.0], ["a", "a"]) == Estimate(0.5, 1, 0.0, 1.0)
    assert clustered_mean([]) is clustered_share([]) is clustered_difference([]) is None


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 9)), min_size=1, max_size=20))
@example([(0.0, 0), (5e-133, 1)])
def test_the_interval_holds_the_estimate(rows):
    values, clusters = zip(*rows, strict=True)
    estimate = clustered_mean(values, clusters)
    assert estimate.value == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert estimate.n == len(set(clusters))
    assert estimate.low - 1e-6 <= estimate.value <= estimate.high + 1e-6


@given(st.lists(st.tuples(st.sampled_from([0, 0.5, 1]), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_interval_of_a_share_is_never_empty_and_never_leaves_it(rows):
    values, clusters = zip(*rows, strict=True)
    estimate = clustered_share(values, clusters)
    assert estimate.value == pytest.approx(sum(values) / len(values))
    assert 0 <= estimate.low < estimate.high <= 1
    assert estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9


@pytest.mark.parametrize(
    ("p", "n", "least"),
    [
        (0.97, 20, 0.97),
        (0.97, 35, 0.97),
        (0.97, 60, 0.95),
        (0.97, 156, 0.93),
        (0.9, 20, 0.93),
        (0.9, 35, 0.915),
        (0.5, 20, 0.93),
        (0.5, 35, 0.93),
        (0.6, 35, 0.93),
        (0.7, 35, 0.93),
        (0.7, 156, 0.93),
    ],
)
def test_the_interval_of_a_share_holds_it_nineteen_times_in_twenty(p, n, least):
    """Exactly, over every number of hits. Percentile bootstraps held 0.97 of 35 in 65 %, and 0.9 of 20 in 89 %."""
    held = 0.0
    for hits in range(n + 1):
        estimate = clustered_share([1.0] * hits + [0.0] * (n - hits))
        held += math.comb(n, hits) * p**hits * (1 - p) ** (n - hits) * (estimate.low <= p <= estimate.high)
    assert least <= held <= 0.985


@pytest.mark.parametrize("likeness", [0.0, 0.2, 0.9])
@pytest.mark.parametrize("p", [0.5, 0.7, 0.97])
def test_the_interval_of_a_share_knows_clusters(p, likeness):
    """One to six samples of each of 35 prompts, which are alike: each prompt has a rate of its own around p."""
    rng = np.random.default_rng(3)
    held = []
    for _ in range(1000):
        sizes = rng.integers(1, 7, 35)
        rates = rng.beta(p * (1 / likeness - 1), (1 - p) * (1 / likeness - 1), 35) if likeness else np.full(35, p)
        clusters = np.repeat(np.arange(35), sizes)
        values = rng.random(len(clusters)) < rates[clusters]
        estimate = clustered_share(values.astype(float).tolist(), clusters.tolist())
        held.append(estimate.low <= p <= estimate.high)
    assert 0.93 <= sum(held) / 1000 <= (0.995 if p > 0.9 else 0.98)


@pytest.mark.parametrize(("ties", "wins"), [(0.5, 0.25), (0.3, 0.5), (0.6, 0.35), (0.1, 0.85)])
def test_the_interval_of_a_win_rate_knows_ties(ties, wins):
    """Ties vary less than wins and losses, so the interval is narrower than that of as many of these."""
    rng = np.random.default_rng(4)
    true, held, width = ties / 2 + wins, [], []
    for _ in range(1000):
        draw = rng.random(35)
        estimate = clustered_share(np.where(draw < ties, 0.5, (draw < ties + wins) * 1.0).tolist())
        held.append(estimate.low <= true <= estimate.high)
        width.append(estimate.high - estimate.low)
    assert 0.93 <= sum(held) / 1000 <= 0.98
    even = clustered_share([1.0] * round(35 * true) + [0.0] * (35 - round(35 * true)))
    assert np.mean(width) < even.high - even.low


def test_a_difference_of_outcomes_is_not_certain_where_all_are_equal():
    # Ten gains of 1 are ten of ten in a share: [0.722467, 1], and twice that less 1.
    estimate = clustered_difference([1.0] * 10)
    assert (estimate.value, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(2 * 0.722467 - 1, abs=1e-5)
    assert clustered_difference([0.0] * 10).low < 0 < clustered_difference([0.0] * 10).high


def test_paired_gain():
    # Gains 0.3, -0.1, 0, 0.2: mean 0.1, and wins 1, 0, 1/2, 1.
    found = paired_gain([0.5, 0.1, 0.2, 0.6], [0.2, 0.2, 0.2, 0.4], list("pqrs"))
    assert (found.gain.value, found.gain.n) == (pytest.approx(0.1), 4)
    assert (found.win_rate.value, found.win_rate.n) == (0.625, 4)
    assert paired_gain([], [], []) is None


def test_flat():
    assert Estimate(0.12345678, 7, -1.0, 1.0).flat("x") == {"x": 0.123457, "x_n": 7, "x_low": -1.0, "x_high": 1.0}


def test_an_interval_that_is_the_whole_line_is_json():
    single = clustered_mean([0.5])
    assert single is not None
    assert single.flat("x") == {"x": 0.5, "x_n": 1, "x_low": None, "x_high": None}
    json.dumps(single.flat("x"), allow_nan=False)


def test_expected_calibration_error_by_hand():
    # [0, 0.1): p 0.05, happened 0, gap 0.05. [0.6, 0.7): p 0.65 twice, happened 0.5, gap 0.15. [0.9, 1]: gap 0.
    # (1 * 0.05 + 2 * 0.15 + 1 * 0) / 4 = 0.0875.
    assert expected_calibration_error([0.05, 0.65, 0.65, 1.0], [0, 1, 0, 1]) == pytest.approx(0.0875)
    # One bin: |mean p - mean outcome| = |0.5875 - 0.5|.
    assert expected_calibration_error([0.05, 0.65, 0.65, 1.0], [0, 1, 0, 1], bins=1) == pytest.approx(0.0875)
    assert expected_calibration_error([0.9, 0.1], [0, 1], bins=1) == pytest.approx(0)
    assert expected_calibration_error([0.9, 0.1], [0, 1]) == pytest.approx(0.9)


def test_expected_calibration_error_of_soft_outcomes_and_of_nothing():
    assert expected_calibration_error([0.3, 0.7], [0.3, 0.7]) == pytest.approx(0)
    assert expected_calibration_error([], []) is None


def test_pairs_agreement():
    # Right, wrong, wrong, right; no opinion counts half; a true tie is left out.
    assert pairs_agreement([1, 1, -2, -2, 0, 3], [0.1, -5, 1, -1, 1, 0]) == [1, 0, 0, 1, 0.5]
    assert pairs_agreement([], []) == []


def test_the_score_interval_of_a_share_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, half width 1.96 sqrt(0.016 + 0.0096036) / 1.38415.
    share = clustered_share([1.0] * 8 + [0.0] * 2)
    assert (share.value, share.n) == (0.8, 10)
    assert share.low == pytest.approx(0.490162, abs=1e-5)
    assert share.high == pytest.approx(0.943318, abs=1e-5)
    # None of 10 is not never: z^2 / (n + z^2).
    none = clustered_share([0.0] * 10)
    assert (none.value, none.low) == (0.0, pytest.approx(0.0, abs=1e-9))
    assert none.high == pytest.approx(0.277533, abs=1e-5)
