"""What a labeler says -> a verdict, or the reason why there is none."""

import functools
import math

import pytest

from rlaif.engines.base import Likelihood, OptionMass
from rlaif.labeling.aggregate import logit
from rlaif.labeling.verdicts import distribution, expected_score, likelihood_ratio, probability
from rlaif.records import Label

BLANK = functools.partial(Label, prompt_id="p", mode="pairwise", principle="k", labeler="l")
ODD = [math.nan, math.inf]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("minimum", [0.0, 0.5])
def test_masses_that_are_no_numbers_are_no_verdict(odd, minimum):
    good, bad = OptionMass((0.6, 0.3), "logprob"), OptionMass((odd, 0.3), "logprob")
    # Not even where other answers to the same question are sound.
    for answers in ([bad], [good, bad]):
        label = probability(BLANK, answers, minimum)
        assert (label.p, label.reason, label.option_mass) == (None, "not_finite", None)
    for verdict in (distribution, expected_score):
        masses = (0.05,) * 8 + (odd,)
        label = verdict(BLANK, OptionMass(masses, "logprob"), minimum)
        assert (label.probs, label.score, label.reason, label.option_mass) == (None, None, "not_finite", None)
    assert probability(BLANK, [good], minimum).p == pytest.approx(2 / 3)


def test_coverage_counts_what_was_seen_and_no_bound():
    low, enough = (OptionMass((mass, 0.1), "logprob", observed=mass) for mass in (0.45, 0.5))
    label = probability(BLANK, [low], 0.5)
    assert (label.p, label.reason, label.option_mass) == (None, "uncovered", 0.45)
    label = probability(BLANK, [enough], 0.5)
    assert (label.p, label.option_mass) == (pytest.approx(5 / 6), 0.5)
    label = distribution(BLANK, low, 0.5)
    assert (label.probs, label.reason, label.option_mass) == (None, "uncovered", 0.45)
    label = distribution(BLANK, enough, 0.5)
    assert (label.probs, label.option_mass) == (pytest.approx((5 / 6, 1 / 6)), 0.5)


@pytest.mark.parametrize(("one", "other"), [(math.nan, -3.0), (-3.0, -math.inf), (-math.inf, -math.inf)])
def test_likelihoods_that_are_no_numbers_are_no_verdict(one, other):
    label = likelihood_ratio(BLANK, [Likelihood(one, 4), Likelihood(other, 4)], normalize=True)
    assert (label.score, label.reason) == (None, "not_finite")


def replies(votes, *counts):
    """What an engine makes of so many replies, of which each option is named by so many."""
    return OptionMass(tuple(count / votes for count in counts), "votes" if votes > 1 else "text", replies=votes)


@pytest.mark.parametrize(
    ("votes", "first", "second", "expected"),
    [
        # log((k + 1/2) / (n - k + 1/2)): log(8.5 / 0.5), log(5.5 / 3.5), log(3).
        (8, 8, 0, 2.833213),
        (8, 0, 8, -2.833213),
        (8, 5, 3, 0.451985),
        (8, 4, 4, 0.0),
        (1, 1, 0, 1.098612),
        (1, 0, 1, -1.098612),
        # Of 8 replies 2 name neither: log(6.5 / 0.5).
        (8, 6, 0, 2.564949),
    ],
)
def test_replies_are_counts_and_no_probabilities(votes, first, second, expected):
    label = probability(BLANK, [replies(votes, first, second)], 0.5)
    assert logit(label.p) == pytest.approx(expected, abs=1e-6)
    assert label.replies == first + second
    # What is known exactly is not smoothed.
    label = probability(BLANK, [OptionMass((0.9, 0.0), "logprob")], 0.5)
    assert (label.p, label.replies) == (1.0, None)


def test_replies_after_several_rationales_are_counted_together():
    # 8 and 6 of 8: a mean of 7 / 8 of 16, (14 + 1/2) / 17. Clipped to 0.6 each: (9.6 + 1/2) / 17.
    answers = [replies(8, 8, 0), replies(8, 6, 2)]
    assert probability(BLANK, answers, 0.5).p == pytest.approx(14.5 / 17)
    assert probability(BLANK, answers, 0.5, clamp=0.4).p == pytest.approx(10.1 / 17)
    # One without a verdict has no part in it.
    assert probability(BLANK, [*answers, replies(8, 0, 0)], 0.5).p == pytest.approx(14.5 / 17)


def test_replies_over_many_options_share_one_more_between_them():
    # 3, 1, 0, 0 of 4: (3 + 1/4) / 5, (1 + 1/4) / 5, 1/4 / 5.
    label = distribution(BLANK, replies(4, 3, 1, 0, 0), 0.5)
    assert label.probs == pytest.approx((0.65, 0.25, 0.05, 0.05))
    assert label.replies == 4
    # One reply of 9, one shared between 1 to 9: the mean of 9 and 5.
    label = expected_score(BLANK, replies(1, *[0] * 8, 1), 0.5)
    assert label.probs == pytest.approx((1 / 18,) * 8 + (10 / 18,))
    assert label.score == pytest.approx((5 + 9) / 2)
