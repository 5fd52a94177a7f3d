"""The fitted temperature is the one that made the labels."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlaif.evaluation.statistics import fit_temperature


@settings(max_examples=30, deadline=None)
@given(st.floats(0.1, 10), st.lists(st.floats(-5, 5).filter(lambda x: abs(x) > 0.1), min_size=1, max_size=20))
def test_a_known_temperature_is_recovered(temperature, margins):
    labels = [1 / (1 + math.exp(-margin / temperature)) for margin in margins]
    assume(all(0.01 < abs(label - 0.5) < 0.499 for label in labels))
    assert fit_temperature(margins, labels) == pytest.approx(temperature, rel=2e-3)


def test_hard_labels():
    # Margins of 1, three of four right: sigmoid(1 / T) = 3 / 4, so T = 1 / log(3) = 0.910239.
    assert fit_temperature([1.0] * 4, [1, 1, 1, 0]) == pytest.approx(0.9102, abs=2e-4)


def test_the_ends_of_the_range():
    # Always right: as cold as it goes, e^-4. Always wrong: as hot as it goes, e^4.
    assert fit_temperature([1.0, 2.0], [1, 1]) < 0.1
    assert fit_temperature([1.0, 2.0], [0, 0]) == pytest.approx(math.exp(4), rel=1e-3)
