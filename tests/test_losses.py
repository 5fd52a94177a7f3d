"""The maths agrees with numbers worked out by hand and with naive implementations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from rlaif.losses import (
    adaptive_kl_coef,
    dpo_margin,
    entropy,
    explained_variance,
    gae,
    kl_k1,
    kl_k2,
    kl_k3,
    masked_mean,
    ppo_policy_loss,
    ppo_value_loss,
    shaped_rewards,
    soft_bradley_terry,
    state_logps,
    token_logps,
    whiten,
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=tolerance)


# Soft Bradley-Terry


@pytest.mark.parametrize(
    ("margin", "p", "expected"),
    [
        # log(1 + e^-2) = 0.126928; log(1 + e^2) = 2.126928.
        (2.0, 1.0, 0.126928),
        (2.0, 0.0, 2.126928),
        (2.0, 0.5, (0.126928 + 2.126928) / 2),
        (2.0, 0.7, 0.7 * 0.126928 + 0.3 * 2.126928),
        # At margin 0 every label costs log 2.
        (0.0, 1.0, 0.693147),
        (0.0, 0.7, 0.693147),
    ],
)
def test_soft_bradley_terry(margin, p, expected):
    close(soft_bradley_terry(tensor([margin]), tensor([p])), [expected])


@pytest.mark.parametrize("p", [1.0, 0.7, 0.5])
def test_soft_bradley_terry_gradient_at_margin_zero(p):
    # d/dm = sigmoid(m) - p.
    margin = torch.zeros(1, requires_grad=True)
    soft_bradley_terry(margin, tensor([p])).sum().backward()
    close(margin.grad, [0.5 - p])


@given(st.floats(0.01, 0.99))
def test_soft_bradley_terry_is_least_where_the_model_says_the_label(p):
    best = math.log(p / (1 - p))
    around = tensor([best - 0.3, best, best + 0.3], dtype=torch.float64)
    losses = soft_bradley_terry(around, torch.full((3,), p, dtype=torch.float64))
    assert losses.argmin() == 1


def test_soft_bradley_terry_is_finite_for_huge_margins():
    close(soft_bradley_terry(tensor([1e4, -1e4]), tensor([1.0, 1.0])), [0.0, 1e4])


# Log-probabilities and entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_are_gathered_log_softmax(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 4, 11, generator=generator)).to(dtype)
    tokens = torch.randint(11, (3, 4), generator=generator)
    logps = token_logps(logits, tokens)
    assert logps.dtype == torch.float32
    for row in range(3):
        for column in range(4):
            expected = torch.log_softmax(logits[row, column].double(), -1)[tokens[row, column]]
            assert float(logps[row, column]) == pytest.approx(float(expected), abs=1e-5)


def test_token_logps_by_hand():
    # Odds 1 : 3, so probabilities 1/4 and 3/4.
    logits = tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    close(token_logps(logits, tensor([[0, 1]])), [[math.log(0.25), math.log(0.75)]])


def test_entropy():
    # Uniform over 8: log 8. (1/4, 3/4): 0.25 log 4 + 0.75 log(4/3) = 0.562335. One sure token: 0.
    close(entropy(torch.zeros(1, 1, 8)), [[math.log(8)]])
    close(entropy(tensor([[[0.0, math.log(3)]]])), [[0.562335]])
    close(entropy(tensor([[[0.0, 200.0]]])), [[0.0]])


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [1, 30, 10**6])
def test_logps_in_pieces_have_the_same_values_and_gradients(trained, temperature, max_logits):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(5, 11).requires_grad_(trained)
    tokens, weights = torch.randint(11, (7,), generator=generator), torch.randn(2, 7, generator=generator)
    states = torch.randn(7, 5, generator=generator)

    def run(function):
        leaf = states.clone().requires_grad_()
        head.zero_grad()
        pair = function(leaf)
        sum((one * weight).sum() for one, weight in zip(pair, weights, strict=True)).backward()
        return [*(one.detach() for one in pair), leaf.grad, *(value.grad for value in head.parameters())]

    def whole(leaf):
        logits = head(leaf) / temperature
        return token_logps(logits, tokens), entropy(logits)

    pieces = run(lambda leaf: state_logps(leaf, head, tokens, temperature, True, max_logits))
    for one, other in zip(run(whole), pieces, strict=True):
        torch.testing.assert_close(one, other)


def test_logps_in_pieces_never_hold_all_logits():
    seen = []

    def head(states):
        seen.append(len(states))
        return states.repeat(1, 10)

    state_logps(torch.randn(100, 3, requires_grad=True), head, torch.zeros(100, dtype=torch.long), max_logits=240)
    assert max(seen) == 8
    assert sum(seen) == 1 + 100


def test_logps_in_pieces_ask_for_entropy_only_where_it_is_wanted():
    logps, entropies = state_logps(torch.randn(3, 4), torch.nn.Identity(), torch.tensor([0, 1, 2]))
    assert (logps < 0).all()
    assert (entropies == 0).all()


# Masked statistics


def test_masked_mean():
    assert float(masked_mean(tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]), tensor([[1.0, 1, 0], [1, 0, 0]]))) == 3
    assert float(masked_mean(torch.ones(1, 2), torch.zeros(1, 2))) == 0


MASK = tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("junk", [0.0, 1e3])
def test_whiten_by_hand(junk):
    # Values 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5, root 2.236068.
    values = tensor([[1.0, 3.0, 5.0], [7.0, junk, junk]])
    shifted = [[-1.341641, -0.447214, 0.447214], [1.341641, 0.0, 0.0]]
    close(whiten(values, MASK), shifted)
    close(whiten(values, MASK, shift_mean=False), [[2.658359, 3.552786, 4.447214], [5.341641, 0.0, 0.0]])


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12), st.data())
def test_whiten_properties(numbers, data):
    bits = data.draw(st.lists(st.booleans(), min_size=len(numbers), max_size=len(numbers)).filter(any))
    values, mask = tensor([numbers], dtype=torch.float64), tensor([bits]).double()
    kept = values[mask.bool()]
    white, unshifted = whiten(values, mask), whiten(values, mask, shift_mean=False)
    assert float(masked_mean(white, mask)) == pytest.approx(0, abs=1e-6)
    assert float(masked_mean(unshifted, mask)) == pytest.approx(float(kept.mean()), abs=1e-6)
    assert (white[~mask.bool()] == 0).all()
    assert (unshifted[~mask.bool()] == 0).all()
    if float(kept.var(unbiased=False)) > 1e-2:
        assert float(masked_mean(white**2, mask)) == pytest.approx(1, abs=1e-4)


# KL estimators


def test_kl_estimators_by_hand():
    # p = 0.5, q = 0.25: k1 = log 2 = 0.693147; k2 = (log 2)^2 / 2 = 0.240227; k3 = 0.5 - 1 + log 2 = 0.193147.
    # p = 0.25, q = 0.5: k1 = -log 2; k2 is the same; k3 = 2 - 1 - log 2 = 0.306853.
    p, q = tensor([[0.5, 0.25]]).log(), tensor([[0.25, 0.5]]).log()
    close(kl_k1(p, q), [[0.693147, -0.693147]])
    close(kl_k2(p, q), [[0.240227, 0.240227]])
    close(kl_k3(p, q), [[0.193147, 0.306853]])


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_never_negative(logp, ref_logp):
    assert float(kl_k3(tensor([logp]), tensor([ref_logp]))) >= 0


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=8))
def test_kl_estimators_are_unbiased(weights):
    # The exact expectation over a small distribution, by enumeration.
    p, q = (tensor(side, dtype=torch.float64) / sum(side) for side in zip(*weights, strict=True))
    kl = float(sum(p * (p / q).log()))
    assert float((p * kl_k1(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-9)
    assert float((p * kl_k3(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-9)


def test_k2_is_the_kl_to_second_order():
    # Expectations over (p, 1 - p) against (q, 1 - q): the error falls with the third power of the distance.
    def error(distance):
        p, q = (tensor([x, 1 - x], dtype=torch.float64) for x in (0.4, 0.4 + distance))
        return float((p * (kl_k2(p.log(), q.log()) - kl_k1(p.log(), q.log()))).sum())

    assert abs(error(0.001)) == pytest.approx(abs(error(0.01)) / 1000, rel=0.1)
    assert abs(error(0.01)) > 1e-7


# Rewards and advantages


def test_shaped_rewards_put_the_score_on_the_last_real_token():
    # -0.5 * kl on completion tokens; row 0 ends at column 2, row 1 at column 0.
    kl = tensor([[0.2, -0.4, 0.6], [1.0, 9.0, 9.0]])
    rewards = shaped_rewards(tensor([10.0, -3.0]), kl, MASK, kl_coef=0.5)
    close(rewards, [[-0.1, 0.2, 9.7], [-3.5, 0.0, 0.0]])


def test_shaped_rewards_leave_their_input_alone():
    kl = torch.ones(2, 3)
    shaped_rewards(tensor([1.0, 1.0]), kl, MASK, 1.0)
    assert (kl == 1).all()


REWARDS, VALUES, ONES = tensor([[1.0, 2.0, 3.0]]), tensor([[0.5, 1.0, 1.5]]), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages", "returns"),
    [
        # gamma 1: delta = 1 + 1 - 0.5, 2 + 1.5 - 1, 3 - 1.5 = 1.5, 2.5, 1.5.
        (1.0, 0.0, [1.5, 2.5, 1.5], [2.0, 3.5, 3.0]),
        # lambda 1: what is still to come (6, 5, 3) minus the value.
        (1.0, 1.0, [5.5, 4.0, 1.5], [6.0, 5.0, 3.0]),
        # lambda 0.5: A2 = 1.5, A1 = 2.5 + 0.75 = 3.25, A0 = 1.5 + 1.625 = 3.125.
        (1.0, 0.5, [3.125, 3.25, 1.5], [3.625, 4.25, 3.0]),
        # gamma 0.9: delta = 1.4, 2.35, 1.5; A1 = 2.35 + 0.45 * 1.5 = 3.025, A0 = 1.4 + 0.45 * 3.025 = 2.76125.
        (0.9, 0.5, [2.76125, 3.025, 1.5], [3.26125, 4.025, 3.0]),
    ],
)
def test_gae_by_hand(gamma, lam, advantages, returns):
    result = gae(REWARDS, VALUES, ONES, gamma, lam)
    close(result[0], [advantages])
    close(result[1], [returns])


def naive_gae(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma * lambda)^l * delta_{t+l}, one episode, plain numbers."""
    length = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < length else 0) - values[t] for t in range(length)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


numbers = st.floats(-10, 10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 3),
    numbers,
)
def test_gae_equals_the_sum_whatever_stands_in_the_padding(episodes, gamma, lam, extra, junk):
    width = max(map(len, episodes)) + extra
    rewards = torch.full((len(episodes), width), junk, dtype=torch.float64)
    values, mask = rewards.clone(), torch.zeros_like(rewards)
    for row, episode in enumerate(episodes):
        rewards[row, : len(episode)] = tensor([r for r, _ in episode], dtype=torch.float64)
        values[row, : len(episode)] = tensor([v for _, v in episode], dtype=torch.float64)
        mask[row, : len(episode)] = 1
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, episode in enumerate(episodes):
        length = len(episode)
        expected = naive_gae([r for r, _ in episode], [v for _, v in episode], gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        wanted = [a + v for a, (_, v) in zip(expected, episode, strict=True)]
        assert returns[row, :length].tolist() == pytest.approx(wanted, abs=1e-9)
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


# PPO


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        # Inside the range: -A * ratio, and its gradient with respect to the log-probability is the same number.
        (1.1, 2.0, -2.2, 0.0, -2.2),
        (0.9, -2.0, 1.8, 0.0, 1.8),
        # Past the range in the direction that the advantage asks for: flat.
        (1.5, 2.0, -2.4, 1.0, 0.0),
        (0.5, -2.0, 1.6, 1.0, 0.0),
        # Past the range the wrong way: the full gradient brings it back.
        (0.5, 2.0, -1.0, 0.0, -1.0),
        (1.5, -2.0, 3.0, 0.0, 3.0),
    ],
)
def test_ppo_policy_loss(ratio, advantage, loss, clipped, gradient):
    old = tensor([[-1.0]])
    logps = (old + math.log(ratio)).requires_grad_()
    result, flag = ppo_policy_loss(logps, old, tensor([[advantage]]), torch.ones(1, 1), clip_range=0.2)
    close(result.detach(), [[loss]])
    close(flag, [[clipped]])
    result.sum().backward()
    close(logps.grad, [[gradient]])


def test_ppo_policy_loss_is_zero_on_padding():
    logps = tensor([[0.5, 3.0]], requires_grad=True)
    loss, flag = ppo_policy_loss(logps, torch.zeros(1, 2), torch.ones(1, 2), tensor([[1.0, 0.0]]), 0.2)
    assert loss[0, 1] == 0
    assert flag[0, 1] == 0
    loss.sum().backward()
    assert logps.grad[0, 1] == 0


def test_ppo_value_loss():
    # Old value 1, range 0.2, return 2.
    # 1.1 (inside): 0.5 * 0.9^2 = 0.405. 1.8: clipped 1.2 is the worse: 0.5 * 0.8^2 = 0.32 (plain would be 0.02).
    # 0.5: clipped 0.8 gives 0.72, plain 1.125 is the worse. 2.9: clipped 1.2 gives 0.32, plain 0.405 is the worse.
    values = tensor([[1.1, 1.8, 0.5, 2.9]], requires_grad=True)
    loss = ppo_value_loss(values, torch.ones(1, 4), torch.full((1, 4), 2.0), clip_range=0.2)
    close(loss.detach(), [[0.405, 0.32, 1.125, 0.405]])
    loss.sum().backward()
    close(values.grad, [[-0.9, 0.0, -1.5, 0.9]])


def test_explained_variance():
    # Returns 1, 3, 5, 7: variance 5. Values 1, 3, 5, 3: the error 0, 0, 0, 4 has variance 3; 1 - 3/5.
    mask = tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    returns = tensor([[1.0, 3.0, 5.0], [7.0, 99.0, 99.0]])
    values = tensor([[1.0, 3.0, 5.0], [3.0, -50.0, 0.0]])
    assert float(explained_variance(values, returns, mask)) == pytest.approx(0.4)
    # Perfect up to a constant: 1. A constant: 0. The wrong way round: below 0. Nothing to explain: 0.
    assert float(explained_variance(returns - 2, returns, mask)) == pytest.approx(1)
    assert float(explained_variance(torch.ones(2, 3), returns, mask)) == pytest.approx(0)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3)
    assert float(explained_variance(values, torch.ones(2, 3), mask)) == 0


def test_dpo_margin():
    # Chosen: -5 - (-7) = 2; rejected: -6 - (-5) = -1; 0.1 * 3 = 0.3. The same policy as the reference: 0.
    logps, ref = tensor([[-5.0, -6.0], [-3.0, -4.0]]), tensor([[-7.0, -5.0], [-3.0, -4.0]])
    close(dpo_margin(logps, ref, beta=0.1), [0.3, 0.0])


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        # error = kl / 6 - 1, clipped to +-0.2; factor 1 + error * 64 / 1000.
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 0.064)),
        (600.0, 0.1 * 1.0128),
        (0.0, 0.1 * 0.9872),
        (-50.0, 0.1 * 0.9872),
    ],
)
def test_adaptive_kl_coef(kl, expected):
    assert adaptive_kl_coef(0.1, kl, target=6.0, episodes=64, horizon=1000) == pytest.approx(expected, rel=1e-9)
