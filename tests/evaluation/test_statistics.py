"""Estimates, intervals and calibration agree with what can be worked out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    expected_calibration_error,
    pairs_agreement,
    proportion,
)


def test_interval_of_normal_data():
    # 400 draws of standard deviation 2: the standard error is s / 20 and the interval is 1.96 of them each way.
    data = np.random.default_rng(0).normal(3, 2, 400)
    estimate = bootstrap_mean(data, resamples=4000)
    error = data.std() / 20
    assert estimate.value == pytest.approx(data.mean())
    assert estimate.n == 400
    assert estimate.high - estimate.value == pytest.approx(1.96 * error, rel=0.08)
    assert estimate.value - estimate.low == pytest.approx(1.96 * error, rel=0.08)


def test_coverage():
    # 200 experiments of 40 draws: 95 % of the intervals hold the truth; the percentile bootstrap is a bit short.
    draws = np.random.default_rng(1).normal(size=(200, 40))
    estimates = [bootstrap_mean(row, resamples=400) for row in draws]
    assert sum(estimate.low <= 0 <= estimate.high for estimate in estimates) / 200 == pytest.approx(0.94, abs=0.05)


def test_clusters_widen_the_interval():
    # Every value four times: clusters know that there are 100, not 400, so the interval is twice as wide.
    data = np.repeat(np.random.default_rng(2).normal(size=100), 4)
    clusters = np.repeat(np.arange(100), 4).tolist()
    alone, together = bootstrap_mean(data), bootstrap_mean(data, clusters)
    assert (alone.n, together.n) == (400, 100)
    assert alone.value == pytest.approx(together.value)
    assert (together.high - together.low) / (alone.high - alone.low) == pytest.approx(2, rel=0.15)


def test_clusters_of_unlike_size():
    # The value is the mean of all observations, not of cluster means: (1 + 1 + 1 + 5) / 4 = 2, within [1, 5].
    estimate = bootstrap_mean([1, 1, 1, 5], ["a", "a", "a", "b"])
    assert estimate == Estimate(2.0, 2, 1.0, 5.0)


def test_one_cluster_says_nothing_about_spread():
    estimate = bootstrap_mean([1.0, 2.0], ["a", "a"])
    assert estimate == Estimate(1.5, 1, float("-inf"), float("inf"))
    assert bootstrap_mean([]) is None


def test_the_resampling_is_repeatable():
    data = np.random.default_rng(3).normal(size=50)
    assert bootstrap_mean(data, seed=1) == bootstrap_mean(data, seed=1)
    assert bootstrap_mean(data, seed=1) != bootstrap_mean(data, seed=2)


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=20))
def test_the_interval_stays_within_the_data(rows):
    values, clusters = zip(*rows, strict=True)
    estimate = bootstrap_mean(values, clusters, resamples=50)
    assert estimate.value == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert estimate.n == len(set(clusters))
    if estimate.n > 1:
        assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9


def test_flat():
    assert Estimate(0.12345678, 7, -1.0, 1.0).flat("x") == {"x": 0.123457, "x_n": 7, "x_low": -1.0, "x_high": 1.0}


def test_an_interval_that_is_the_whole_line_is_json():
    single = bootstrap_mean([0.5])
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
    share = proportion([1.0] * 8 + [0.0] * 2)
    assert (share.value, share.n) == (0.8, 10)
    assert share.low == pytest.approx(0.490162, abs=1e-5)
    assert share.high == pytest.approx(0.943318, abs=1e-5)
    # None of 10 is not never: z^2 / (n + z^2).
    none = proportion([0.0] * 10)
    assert (none.value, none.low) == (0.0, pytest.approx(0.0, abs=1e-9))
    assert none.high == pytest.approx(0.277533, abs=1e-5)
    assert proportion([]) is None
