"""Our PPO maths is what TRL's own training loop computes."""

import subprocess

import pytest

from benchmarks.ppo import trl_folder, work


@pytest.mark.slow
def test_maths_agrees_with_trl():
    try:
        trl_folder()
    except subprocess.CalledProcessError:
        pytest.skip("TRL 1.12.0 cannot be installed here")
    differences = work("trl_maths", {})
    assert set(differences) == {
        "advantages",
        "kl_k1",
        "kl_k3",
        "logps",
        "policy_loss",
        "returns",
        "rewards",
        "value_loss",
        "whitened_rewards",
        "whitening",
    }
    assert max(differences.values()) < 1e-5, differences
