"""PPO and DPO reach the policy that the KL-regularised objective has as its optimum (docs/optimum.md)."""

import pytest
import torch

from benchmarks.optimum import BETA, PROMPTS, VARIANTS, by_dpo, by_ppo, make_problem
from rlaif.losses import kl_k1, kl_k2, kl_k3


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return make_problem(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def raw(problem):
    return problem.target(problem.scores)


def test_the_completions_are_all_there_are(problem, raw):
    assert len(problem.texts) == 1 + 8 + 64
    for table in (problem.reference, raw.optimum):
        assert table.sum(dim=1).tolist() == pytest.approx([1] * len(PROMPTS), abs=1e-5)
    assert min(raw.distances(problem.reference)["total_variation"]) > 0.4


def test_the_optimum_is_the_best_policy(problem, raw):
    best = raw.distances(raw.optimum)
    # J(pi*) = beta log Z, with Z the mean of exp(r / beta) under the reference.
    z = (problem.reference * (raw.rewards / BETA).exp()).sum(dim=1)
    assert best["objective"] == pytest.approx((BETA * z.log()).tolist(), abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0):
        other = raw.optimum * (scale * torch.randn(raw.optimum.shape, generator=generator, dtype=torch.float64)).exp()
        found = raw.distances(other / other.sum(dim=1, keepdim=True))
        for row in range(len(PROMPTS)):
            missing = best["objective"][row] - found["objective"][row]
            assert missing > 0
            # What is missing is beta times the KL to the optimum.
            assert missing == pytest.approx(BETA * found["kl_to_optimum"][row], abs=1e-5)


def test_offsets_of_prompts_change_no_optimum(problem, raw):
    moved = problem.target(problem.scores + torch.tensor([[3.0], [0.0], [-5.0], [100.0]]))
    torch.testing.assert_close(moved.optimum, raw.optimum)
    # The penalty for completions that were cut does.
    ended = torch.tensor(problem.ended)
    assert float(raw.optimum[:, ended].sum()) > float(problem.target(problem.scores + ~ended).optimum[:, ended].sum())


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
def test_ppo_comes_near_the_optimum_by_its_defaults(problem, raw, tmp_path):
    for name in ("ppo", "ppo_raw"):
        reached, target = by_ppo(problem, tmp_path / name, **VARIANTS[name])
        before, after = (target.distances(table)["total_variation"] for table in (problem.reference, reached))
        assert max(after) < 0.3, name
        assert sum(after) < 0.3 * sum(before), name


@pytest.mark.slow
def test_dpo_reaches_the_optimum(problem, raw, tmp_path):
    assert max(raw.distances(by_dpo(problem, tmp_path / "run"))["total_variation"]) < 0.05
