"""PPO and DPO reach the policy that the KL-regularised objective has as its optimum (docs/optimum.md)."""

from pathlib import Path

import pytest
import torch

from benchmarks.optimum import BETA, by_dpo, by_ppo, make_problem
from rlaif.losses import kl_k1, kl_k2, kl_k3

TOLERANCE = 0.05


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ppo(problem, tmp_path_factory):
    return quick_ppo(problem, tmp_path_factory.mktemp("ppo") / "run")


@pytest.fixture(scope="module")
def dpo(problem, tmp_path_factory):
    return by_dpo(problem, tmp_path_factory.mktemp("dpo") / "run")


def quick_ppo(problem, folder: Path, **changes):
    settings = {"rollouts": 256, "minibatch_size": 128, "micro_batch_size": 128, "epochs": 2}
    return by_ppo(problem, folder, **settings | changes)


def test_the_completions_are_all_there_are(problem):
    assert len(problem.texts) == 1 + 8 + 64
    for table in (problem.reference, problem.optimum):
        assert float(table.sum()) == pytest.approx(1, abs=1e-5)
    assert problem.distances(problem.reference)["total_variation"] > 0.5


def test_the_optimum_is_the_best_policy(problem):
    best = problem.distances(problem.optimum)
    # J(pi*) = beta log Z, with Z the mean of exp(r / beta) under the reference.
    z = (problem.reference * (problem.rewards / BETA).exp()).sum()
    assert best["objective"] == pytest.approx(BETA * float(z.log()), abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        other = problem.optimum * (scale * torch.randn(73, generator=generator, dtype=torch.float64)).exp()
        found = problem.distances(other / other.sum())
        assert found["objective"] < best["objective"]
        # What is missing is beta times the KL to the optimum.
        assert best["objective"] - found["objective"] == pytest.approx(BETA * found["kl_to_optimum"], abs=1e-5)


def test_only_k1_in_the_reward_follows_the_kl():
    """The gradient of the mean reward that score-function estimates follow, by enumeration over a small table."""
    generator = torch.Generator().manual_seed(0)
    logits, q = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    q = torch.log_softmax(q, -1)

    def gradient(mean):
        return torch.autograd.grad(mean(torch.log_softmax(logits, -1)), logits)[0]

    def followed(estimator):
        return gradient(lambda p: (p.exp() * estimator(p, q).detach()).sum())

    forward = gradient(lambda p: (p.exp() * (p - q)).sum())
    backward = gradient(lambda p: (q.exp() * (q - p)).sum())
    torch.testing.assert_close(followed(kl_k1), forward)
    torch.testing.assert_close(followed(kl_k3), forward - backward)
    torch.testing.assert_close(followed(kl_k2), gradient(lambda p: (p.exp() * kl_k2(p, q)).sum()) - forward)


@pytest.mark.slow
def test_ppo_reaches_the_optimum(problem, ppo):
    assert problem.distances(ppo)["total_variation"] < TOLERANCE


@pytest.mark.slow
def test_dpo_reaches_the_optimum(problem, dpo):
    assert problem.distances(dpo)["total_variation"] < TOLERANCE


@pytest.mark.slow
def test_ppo_and_dpo_agree(ppo, dpo):
    assert float((ppo - dpo).abs().sum() / 2) < TOLERANCE


@pytest.mark.slow
def test_another_beta_leads_elsewhere(problem, tmp_path):
    found = quick_ppo(problem, tmp_path / "run", kl_coef=BETA / 2)
    assert problem.distances(found)["total_variation"] > 2 * TOLERANCE
