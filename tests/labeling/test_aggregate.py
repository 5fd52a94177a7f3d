"""Verdicts combine into soft labels exactly as the arithmetic says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.labeling.aggregate import logit, pair_labels, sigmoid, unswap
from rlaif.records import Label


def pairwise(first, second, p, principle="k", prompt_id="p", reason=None):
    return Label(prompt_id, "pairwise", principle, "l", "logprob", p, reason, first=first, second=second)


def pointwise(candidate, p, principle="k", prompt_id="p"):
    return Label(prompt_id, "pointwise", principle, "l", "logprob", p, candidate=candidate)


def test_sigmoid_and_logit():
    # log(3) = 1.098612 is the logit of 3 / 4.
    assert sigmoid(1.098612) == pytest.approx(0.75, abs=1e-6)
    assert sigmoid(-1.098612) == pytest.approx(0.25, abs=1e-6)
    assert logit(0.75) == pytest.approx(1.098612, abs=1e-6)
    assert (sigmoid(1e5), sigmoid(-1e5)) == (1.0, 0.0)


@given(st.floats(-12, 12))
def test_logit_inverts_sigmoid(x):
    assert logit(sigmoid(x)) == pytest.approx(x, abs=1e-6)


def test_certainty_is_clipped():
    # log((1 - 1e-6) / 1e-6) = 13.815510.
    assert logit(1.0) == pytest.approx(13.815510, abs=1e-5)
    assert logit(0.0) == pytest.approx(-13.815510, abs=1e-5)
    [pair], _ = pair_labels([pairwise("a", "b", 1.0), pairwise("b", "a", 0.0)], {"k": 1})
    assert pair.logit == pytest.approx(13.815510, abs=1e-5)
    assert pair.p == pytest.approx(1 - 1e-6, abs=1e-9)


def test_unswap():
    assert unswap(pairwise("a", "b", 0.75)) == ("a", "b", pytest.approx(1.098612, abs=1e-6))
    # Shown the other way round: P(b better) = 0.75 speaks against a.
    assert unswap(pairwise("b", "a", 0.75)) == ("a", "b", pytest.approx(-1.098612, abs=1e-6))


def test_an_invalid_verdict_stays_invalid():
    assert unswap(pairwise("a", "b", None, reason="uncovered")) == ("a", "b", None)
    assert unswap(pairwise("b", "a", None, reason="uncovered")) == ("a", "b", None)


def test_two_orders_average_in_logits():
    # Logits log(4) and, un-swapped, log(1.5); their mean log(6) / 2 = 0.895880 is p = sqrt(6) / (1 + sqrt(6)).
    labels = [pairwise("a", "b", 0.8), pairwise("b", "a", 0.4)]
    [pair], dropped = pair_labels(labels, {"k": 1.0})
    assert (pair.prompt_id, pair.one, pair.other) == ("p", "a", "b")
    assert pair.logit == pytest.approx(0.895880, abs=1e-6)
    assert pair.p == pytest.approx(0.710102, abs=1e-6)
    assert pair.principles == {"k": pytest.approx(0.895880, abs=1e-6)}
    assert dropped == {"no_verdict": 0}


@given(st.floats(-8, 8), st.floats(-4, 4), st.booleans())
def test_an_additive_position_bias_cancels(value, bias, swapped):
    labels = [pairwise("a", "b", sigmoid(value + bias)), pairwise("b", "a", sigmoid(-value + bias))]
    [pair], _ = pair_labels(labels[::-1] if swapped else labels, {"k": 1.0})
    assert pair.logit == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("second", [[], [pairwise("b", "a", None, reason="timeout")]])
def test_a_missing_order_drops_the_pair(second):
    labels = [pairwise("a", "b", 0.9), *second, pairwise("a", "c", 0.5), pairwise("c", "a", 0.5)]
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    assert [(pair.one, pair.other, pair.logit) for pair in pairs] == [("a", "c", 0.0)]
    assert dropped == {"no_verdict": 1}


def test_one_order_is_enough_when_only_one_was_asked():
    [pair], dropped = pair_labels([pairwise("b", "a", 0.75)], {"k": 1.0}, both_orders=False)
    assert pair.logit == pytest.approx(-1.098612, abs=1e-6)
    assert dropped == {"no_verdict": 0}


def test_principles_are_averaged_by_weight():
    # (3 * log 3 + 1 * log(1/3)) / 4 = log(3) / 2 = 0.549306.
    labels = [
        pairwise("a", "b", 0.75, "x"),
        pairwise("b", "a", 0.25, "x"),
        pairwise("a", "b", 0.25, "y"),
        pairwise("b", "a", 0.75, "y"),
    ]
    [pair], _ = pair_labels(labels, {"x": 3.0, "y": 1.0})
    assert pair.logit == pytest.approx(0.549306, abs=1e-6)
    assert pair.principles == {"x": pytest.approx(1.098612, abs=1e-6), "y": pytest.approx(-1.098612, abs=1e-6)}
    # A principle that it was not asked under has no say in it; one that has no verdict on the pair takes it along.
    assert pair_labels(labels, {"x": 3.0, "y": 1.0, "z": 1.0})[0] == [pair]
    labels += [pairwise("a", "b", 0.75, "z"), pairwise("b", "a", None, "z", reason="timeout")]
    pairs, dropped = pair_labels(labels, {"x": 3.0, "y": 1.0, "z": 1.0})
    assert (pairs, dropped) == ([], {"no_verdict": 1})


def test_temperature_divides_the_logit():
    labels = [pairwise("a", "b", 0.75), pairwise("b", "a", 0.25)]
    [pair], _ = pair_labels(labels, {"k": 1.0}, temperature=2.0)
    assert pair.logit == pytest.approx(0.549306, abs=1e-6)


def test_pointwise_is_the_difference_of_logits():
    # a: log 3, b: 0, c: -log 3.
    labels = [pointwise("b", 0.5), pointwise("a", 0.75), pointwise("c", 0.25)]
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    found = {(pair.one, pair.other): pair.logit for pair in pairs}
    assert found == pytest.approx({("a", "b"): 1.098612, ("a", "c"): 2.197225, ("b", "c"): 1.098612}, abs=1e-5)
    assert dropped == {"no_verdict": 0}


def test_pointwise_without_a_verdict_drops_its_pairs():
    labels = [pointwise("a", 0.5), pointwise("b", None), pointwise("c", 0.5), pointwise("a", 0.5, prompt_id="q")]
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    assert [(pair.one, pair.other) for pair in pairs] == [("a", "c")]
    assert dropped == {"no_verdict": 2}


def test_prompts_do_not_mix():
    labels = [pairwise("a", "b", 0.75, prompt_id="p"), pairwise("b", "a", 0.25, prompt_id="q")]
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    assert (pairs, dropped) == ([], {"no_verdict": 2})


@given(st.lists(st.floats(0.001, 0.999), min_size=2, max_size=5), st.randoms())
def test_pointwise_does_not_depend_on_the_order_of_labels(values, rng):
    labels = [pointwise(f"c{i}", p) for i, p in enumerate(values)]
    shuffled = labels[:]
    rng.shuffle(shuffled)
    expected, found = (
        {(pair.one, pair.other): pair.logit for pair in pair_labels(order, {"k": 1.0})[0]}
        for order in (labels, shuffled)
    )
    assert found == expected
    assert len(found) == math.comb(len(values), 2)
