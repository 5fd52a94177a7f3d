"""Verdicts combine into soft labels exactly as the arithmetic says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.labeling.aggregate import Calibration, list_logits, logit, p_higher, pair_labels, sigmoid, unswap
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
    # A principle that it was not asked under has no say in it, and nothing of it is missing.
    assert pair_labels(labels, {"x": 3.0, "y": 1.0, "z": 1.0})[0] == [pair]
    assert pair.missing_weight == 0


@pytest.mark.parametrize("second", [[], [pairwise("b", "a", None, "z", reason="timeout")]])
def test_a_pair_is_labelled_by_the_principles_that_have_both_orders(second):
    # z has 2 of 6 of the weight; without it (3 * log 3 + 1 * log(1/3)) / 4 = 0.549306, over a temperature of 2.
    labels = [pairwise("a", "b", 0.75, "x"), pairwise("b", "a", 0.25, "x")]
    labels += [pairwise("a", "b", 0.25, "y"), pairwise("b", "a", 0.75, "y"), pairwise("a", "b", 0.999, "z"), *second]
    weights = {"x": 3.0, "y": 1.0, "z": 2.0}
    for minimum in (0.0, 0.5, 4 / 6):
        [pair], dropped = pair_labels(labels, weights, temperature=2.0, min_weight=minimum)
        assert pair.logit == pytest.approx(0.549306 / 2, abs=1e-6)
        assert pair.missing_weight == pytest.approx(2 / 6)
        assert list(pair.principles) == ["x", "y"]
        assert dropped == {"no_verdict": 0}
    for minimum in (0.7, 1.0):
        assert pair_labels(labels, weights, min_weight=minimum) == ([], {"no_verdict": 0, "missing_weight": 1})


def test_a_pair_without_any_principle_has_no_verdict_whatever_the_minimum():
    labels = [pairwise("a", "b", 0.75, "x"), pairwise("a", "b", None, "y"), pairwise("b", "a", 0.5, "y")]
    assert pair_labels(labels, {"x": 3.0, "y": 1.0}, min_weight=0.0) == ([], {"no_verdict": 1})


def test_candidates_are_compared_under_the_principles_that_both_have():
    # x: a log 3, b 0, c unknown; y: a unknown, b 0, c -log 3. So a and b by x, b and c by y, a and c by none.
    labels = [pointwise("a", 0.75, "x"), pointwise("b", 0.5, "x"), pointwise("c", None, "x")]
    labels += [pointwise("a", None, "y"), pointwise("b", 0.5, "y"), pointwise("c", 0.25, "y")]
    pairs, dropped = pair_labels(labels, {"x": 1.0, "y": 3.0}, min_weight=0.25)
    found = {(pair.one, pair.other): (pair.logit, pair.missing_weight, list(pair.principles)) for pair in pairs}
    assert found == {
        ("a", "b"): (pytest.approx(1.098612, abs=1e-6), 0.75, ["x"]),
        ("b", "c"): (pytest.approx(1.098612, abs=1e-6), 0.25, ["y"]),
    }
    assert dropped == {"no_verdict": 1}


def test_a_list_that_failed_in_one_order_takes_its_principle_alone():
    labels = [listed("ab", (0.75, 0.25), "x"), listed("ba", (0.25, 0.75), "x")]
    labels += [listed("ab", (0.1, 0.9), "y"), listed("ba", None, "y")]
    [pair], _ = pair_labels(labels, {"x": 1.0, "y": 1.0}, min_weight=0.5)
    assert (pair.logit, pair.missing_weight) == (pytest.approx(1.098612, abs=1e-6), 0.5)


def test_how_sure_a_pair_is_does_not_depend_on_verdicts_that_are_missing():
    """The second order of y was not asked, because the first has no verdict: the label is that of both orders of x."""
    calibration = Calibration(temperature=2.0, bias=0.5, single_temperature=4.0)
    labels = [pairwise("a", "b", 0.75, "x"), pairwise("b", "a", 0.25, "x"), pairwise("a", "b", None, "y")]
    [pair], _ = pair_labels(labels, {"x": 1.0, "y": 1.0}, both_orders=False, calibration=calibration, min_weight=0.5)
    assert pair.logit == pytest.approx(1.098612 / 2, abs=1e-6)


def test_temperature_divides_the_logit():
    labels = [pairwise("a", "b", 0.75), pairwise("b", "a", 0.25)]
    [pair], _ = pair_labels(labels, {"k": 1.0}, temperature=2.0)
    assert pair.logit == pytest.approx(0.549306, abs=1e-6)


def test_calibration_of_both_orders_and_of_one():
    calibration = Calibration(temperature=2.0, bias=0.5, single_temperature=4.0)
    labels = [
        # Logits log 3 and, un-swapped, log 3: the bias cancels, and log 3 / 2 = 0.549306.
        pairwise("a", "b", 0.75),
        pairwise("b", "a", 0.25),
        # One order: (log 3 - 0.5) / 4 = 0.149653, and shown the other way round (-log 3 + 0.5) / 4.
        pairwise("a", "c", 0.75),
        pairwise("d", "a", 0.75),
    ]
    pairs, _ = pair_labels(labels, {"k": 1.0}, both_orders=False, calibration=calibration)
    found = {(pair.one, pair.other): pair.logit for pair in pairs}
    assert found == pytest.approx({("a", "b"): 0.549306, ("a", "c"): 0.149653, ("a", "d"): -0.149653}, abs=1e-6)


def test_principles_that_were_not_asked_count_as_undecided():
    # (3 * log 3 + 1 * 0) / 4 = 0.823959.
    labels = [pairwise("a", "b", 0.75, "x"), pairwise("b", "a", 0.25, "x")]
    [pair], _ = pair_labels(labels, {"x": 3.0, "y": 1.0}, all_principles=False)
    assert pair.logit == pytest.approx(0.823959, abs=1e-6)
    # One that was asked and has no verdict is missing, not undecided: (3 * log 3 + 1 * 0) / (5 - 1).
    labels += [pairwise("a", "b", None, "y"), pairwise("b", "a", 0.5, "y")]
    weights = {"x": 3.0, "y": 1.0, "z": 1.0}
    [pair], _ = pair_labels(labels, weights, all_principles=False, min_weight=0.8)
    assert (pair.logit, pair.missing_weight) == (pytest.approx(0.823959, abs=1e-6), pytest.approx(0.2))
    assert pair_labels(labels, weights, all_principles=False, min_weight=0.9)[1]["missing_weight"] == 1


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


def listed(order, probs, principle="k"):
    return Label("p", "listwise", principle, "l", "logprob", order=tuple(order), probs=probs)


def scored(candidate, *probs):
    mean = sum(k * p for k, p in enumerate(probs, 1))
    return Label("p", "score", "k", "l", "logprob", candidate=candidate, score=mean, probs=probs)


def test_a_list_is_a_choice_among_its_pairs():
    # Odds 3 : 1 and 2 : 1, whatever the third has: log 3 = 1.098612, log 2 = 0.693147, log 1.5 = 0.405465.
    found = {(one, other): value for one, other, value in list_logits(listed("bca", (0.2, 0.1, 0.3)))}
    assert found == pytest.approx({("a", "b"): 0.405465, ("a", "c"): 1.098612, ("b", "c"): 0.693147}, abs=1e-6)
    # Clipped at 1e-6: log(1e6) = 13.815511.
    assert [value for *_, value in list_logits(listed("ab", (1.0, 0.0)))] == pytest.approx([13.815511])
    assert list(list_logits(listed("ba", None))) == [("a", "b", None)]


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2)), min_size=2, max_size=6),
    st.randoms(),
)
def test_biases_of_positions_cancel_over_all_rotations(rows, rng):
    utility = {f"c{n}": value for n, (value, _) in enumerate(rows)}
    biases = [bias for _, bias in rows]
    labels = []
    for places in range(len(rows)):
        order = [*list(utility)[places:], *list(utility)[:places]]
        weights = [math.exp(utility[name] + bias) for name, bias in zip(order, biases, strict=True)]
        labels.append(listed(order, tuple(weight / sum(weights) for weight in weights)))
    rng.shuffle(labels)
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    assert (len(pairs), dropped) == (math.comb(len(rows), 2), {"no_verdict": 0})
    for pair in pairs:
        assert pair.logit == pytest.approx(utility[pair.one] - utility[pair.other], abs=1e-7)


def test_one_order_of_a_list_that_failed_takes_its_pairs():
    labels = [listed("ab", (0.5, 0.5)), listed("ba", None)]
    assert pair_labels(labels, {"k": 1.0}) == ([], {"no_verdict": 1})


def test_p_higher_by_hand():
    # P(X > Y) = 0.5 * 0.5 + 0.3 * (0.5 + 0.25) = 0.475; P(X = Y) = 0.2 * 0.5 + 0.5 * 0.25 + 0.3 * 0.25 = 0.3.
    assert p_higher((0.2, 0.5, 0.3), (0.5, 0.25, 0.25)) == pytest.approx(0.475 + 0.15)
    assert p_higher((0.0, 1.0), (1.0, 0.0)) == 1.0


distributions = st.lists(st.floats(1e-9, 1), min_size=9, max_size=9).map(
    lambda values: [value / sum(values) for value in values]
)


@given(distributions, distributions)
def test_p_higher_is_a_preference(one, other):
    assert p_higher(one, one) == 0.5
    assert p_higher(one, other) + p_higher(other, one) == pytest.approx(1)


def test_scores_make_soft_labels():
    # logit(0.625) = log(5 / 3) = 0.510826.
    labels = [scored("b", 0.5, 0.25, 0.25), scored("a", 0.2, 0.5, 0.3)]
    [pair], _ = pair_labels(labels, {"k": 1.0})
    assert (pair.one, pair.other, pair.logit) == ("a", "b", pytest.approx(0.510826, abs=1e-6))
    # Equal distributions are a tie, exactly.
    [pair], _ = pair_labels([scored("a", 0.1, 0.2, 0.7), scored("b", 0.1, 0.2, 0.7)], {"k": 1.0})
    assert pair.logit == 0.0


def test_contrasts_are_subtracted():
    labels = [
        Label("p", "contrastive", "k", "l", "logprob", candidate=name, score=score)
        for name, score in (("a", 1.5), ("b", -20.0), ("c", None))
    ]
    pairs, dropped = pair_labels(labels, {"k": 1.0})
    assert [(pair.one, pair.other, pair.logit) for pair in pairs] == [("a", "b", 21.5)]
    assert dropped == {"no_verdict": 2}


def test_a_pair_is_weighed_by_the_principles_that_it_was_asked_under():
    labels = [pairwise("a", "b", 0.75, "x"), pairwise("b", "a", 0.25, "x")]
    labels += [pairwise("a", "c", 0.25, "y"), pairwise("c", "a", 0.75, "y")]
    pairs, dropped = pair_labels(labels, {"x": 3.0, "y": 1.0})
    assert [pair.logit for pair in pairs] == pytest.approx([1.098612, -1.098612], abs=1e-6)
    assert dropped == {"no_verdict": 0}


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=7))
def test_a_pure_bias_of_positions_is_an_exact_tie(bias):
    """Rounding would choose: sums of the same logarithms in another order differ in their last bits."""
    count, total = len(bias), math.fsum(bias)
    names = [f"c{place}" for place in range(count)]
    probs = [value / total for value in bias]
    labels = [listed((*names[turn:], *names[:turn]), probs) for turn in range(count)]
    pairs, _ = pair_labels(labels, {"k": 1.0})
    assert [pair.logit for pair in pairs] == [0.0] * (count * (count - 1) // 2)
