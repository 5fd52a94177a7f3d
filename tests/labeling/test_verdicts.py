"""What a labeler says -> a verdict, or the reason why there is none."""

import functools
import math

import pytest

from rlaif.engines.base import Likelihood, OptionMass
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
        masses = (0.05,) * 9 + (odd,)
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
