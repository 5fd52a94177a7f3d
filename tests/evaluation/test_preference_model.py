"""Figures about a PM on pairs made by hand, and the fitted temperature."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlaif.evaluation.preference_model import calibration, preference_metrics
from rlaif.evaluation.statistics import fit_temperature
from rlaif.records import Preference


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


class Vowels:
    """A PM that counts the letter a."""

    def score(self, examples):
        return [float(example.completion.count("a")) for example in examples]


def preference(prompt_id, chosen, rejected, p_chosen=0.9, source=""):
    user = ({"role": "user", "content": "q"},)
    return Preference(prompt_id, user, chosen, rejected, "0", "1", p_chosen, "me", "ai", source=source)


def test_accuracy_by_source_and_by_length():
    rows = [
        preference("p", "aaaa", "b", source="x"),  # right, chosen longer
        preference("q", "aaaaaaaaaaaa", "bbbbbbbbbbbb", source="x"),  # right, similar
        preference("r", "b", "aaaa", source="y"),  # wrong, chosen shorter
    ]
    found = preference_metrics(Vowels(), rows)
    assert {name: row["accuracy"] for name, row in found["accuracy_by_source"].items()} == {
        "ai / me / x": 1.0,
        "ai / me / y": 0.0,
    }
    assert {name: (row["accuracy"], row["accuracy_n"]) for name, row in found["accuracy_by_length"].items()} == {
        "chosen longer": (1.0, 1),
        "similar": (1.0, 1),
        "chosen shorter": (0.0, 1),
    }


def test_the_gain_over_the_longer_completion_is_paired():
    rows = [
        preference("p", "aaaa", "b"),  # both right
        preference("q", "a", "bbbb"),  # the PM alone
        preference("r", "a", "bbbb"),  # the PM alone
        preference("s", "b", "aa"),  # both wrong
        preference("t", "b", "aa", p_chosen=0.5),  # a tie counts for neither
    ]
    found = preference_metrics(Vowels(), rows)
    assert (found["accuracy"], found["longer_wins"]) == (0.75, 0.25)
    assert (found["gain_over_longer"], found["gain_over_longer_n"]) == (0.5, 4)


def test_an_accuracy_of_one_on_few_prompts_is_not_certain():
    found = preference_metrics(Vowels(), [preference(name, "aa", "b") for name in "pq"])
    assert (found["accuracy"], found["accuracy_low"]) == (1.0, pytest.approx(0.342, abs=1e-3))


def test_best_of_n_agreement_with_the_labels_and_with_the_gold_judge():
    # By the labels a > b > c everywhere; the PM's best is "aaa" on p and "b" is never.
    rows = [
        preference("p", "aaa", "aa"),
        preference("p", "aaa", "a"),
        preference("p", "aa", "a"),
        preference("q", "bbb", "aa"),
        preference("q", "bbb", "a"),
    ]
    found = preference_metrics(Vowels(), rows)
    assert (found["best_of_n_agreement"], found["best_of_n_agreement_n"]) == (0.5, 2)
    assert found["best_of_n_chance"] == pytest.approx(1 / 3)
    # The gold judge likes vowels: on p all completions tie, on q "aa" and "a" are the best.
    found = preference_metrics(Vowels(), rows, gold="letters")
    assert (found["best_of_n_agreement"], found["best_of_n_agreement_n"]) == (1.0, 1)
    assert found["best_of_n_chance"] == pytest.approx(2 / 3)


def test_calibration_counts_each_completion_once():
    rows = [preference("p", "aaa", "a"), preference("p", "aaa", "b")]
    found = calibration(Vowels(), rows)
    assert (found["n_completions"], found["score_mean"]) == (3, pytest.approx(4 / 3))
