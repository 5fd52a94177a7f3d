"""DPO's losses: against TRL's own code, by hand, and what soft labels must satisfy."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlaif.config import DPOConfig, DPOLoss
from rlaif.methods.dpo_losses import LOSSES, Ratios, soft_dpo_loss

CHOSEN, REJECTED = [-3.0, 0.4, 2.0], [1.5, -0.2, 2.0]
LENGTHS = [4, 2, 3], [3, 4, 4]
SMOOTHING = 0.1


def ratios(chosen: list[float] = CHOSEN, rejected: list[float] = REJECTED) -> Ratios:
    lengths = [torch.tensor(row, dtype=torch.float32) for row in LENGTHS]
    return Ratios(torch.tensor(chosen), torch.tensor(rejected), *lengths)


def trl_loss(kind: DPOLoss, beta: float) -> float:
    """What TRL's DPOTrainer makes of the same pairs: its own method, on a model that returns given figures."""
    from trl import DPOTrainer

    mask = torch.zeros(6, 5)
    logps = torch.zeros(6, 4)
    for row, (ratio, length) in enumerate(zip([*CHOSEN, *REJECTED], [*LENGTHS[0], *LENGTHS[1]], strict=True)):
        mask[row, 1 : length + 1] = 1
        # The reference gives 0, so the log-ratio is the sum of the policy's log-probabilities.
        logps[row, :length] = ratio / length
    blank = torch.zeros(6, 4)

    def model(**inputs: Any) -> Any:
        return SimpleNamespace(log_probs=logps, entropy=blank, mean_logits=blank, is_top1=blank.bool())

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x, process_index=0
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind.value],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=SMOOTHING,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(6, 5, dtype=torch.long),
        "attention_mask": torch.ones(6, 5),
        "completion_mask": mask,
        "ref_chosen_logps": torch.zeros(3),
        "ref_rejected_logps": torch.zeros(3),
    }
    return float(DPOTrainer._compute_loss(trainer, model, inputs, False))


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", list(DPOLoss))
def test_every_loss_is_that_of_trl(kind: DPOLoss, beta: float) -> None:
    ours = LOSSES[kind](ratios(), beta, SMOOTHING).mean()
    assert float(ours) == pytest.approx(trl_loss(kind, beta), rel=1e-5)


def test_every_choice_has_a_loss() -> None:
    assert set(LOSSES) == set(DPOLoss)


def test_by_hand() -> None:
    pair = Ratios(*(torch.tensor([value]) for value in (2.0, -1.0, 4.0, 2.0)))
    beta = 0.5

    def loss(kind: DPOLoss) -> float:
        return float(LOSSES[kind](pair, beta, 0.0))

    assert loss(DPOLoss.sigmoid) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert loss(DPOLoss.hinge) == 0
    assert loss(DPOLoss.ipo) == pytest.approx(0.0)  # 2/4 + 1/2 is 1/(2 * 0.5)
    assert loss(DPOLoss.sppo_hard) == pytest.approx((2 - 1) ** 2 + (-1 + 1) ** 2)
    assert loss(DPOLoss.robust) == pytest.approx(loss(DPOLoss.sigmoid))


@pytest.mark.parametrize("kind", list(DPOLoss))
@given(p=st.floats(0, 1), chosen=st.floats(-5, 5), rejected=st.floats(-5, 5))
def test_a_soft_label_is_the_expected_loss(kind: DPOLoss, p: float, chosen: float, rejected: float) -> None:
    """Linear in the label, the hard loss at its ends, and blind to which side is called chosen."""
    pairs = ratios([chosen] * 3, [rejected] * 3)
    soft = soft_dpo_loss(kind, pairs, torch.full((3,), p), 0.3, SMOOTHING)
    hard, flipped = LOSSES[kind](pairs, 0.3, SMOOTHING), LOSSES[kind](pairs.swapped(), 0.3, SMOOTHING)
    assert torch.allclose(soft, p * hard + (1 - p) * flipped, atol=1e-5)
    other = soft_dpo_loss(kind, pairs.swapped(), torch.full((3,), 1 - p), 0.3, SMOOTHING)
    assert torch.allclose(soft, other, atol=1e-5)


# discopop is not convex, and pulls a pair together while its margin is near zero.
@pytest.mark.parametrize("kind", [kind for kind in DPOLoss if kind is not DPOLoss.discopop])
def test_the_loss_pulls_the_pair_apart(kind: DPOLoss) -> None:
    """At the start, where policy and reference agree, chosen goes up against rejected."""
    chosen, rejected = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    lengths = torch.ones(3)
    LOSSES[kind](Ratios(chosen, rejected, lengths, lengths), 0.3, SMOOTHING).sum().backward()
    assert (chosen.grad < rejected.grad).all()


def test_label_smoothing_is_checked() -> None:
    with pytest.raises(ValueError, match=r"exo_pair needs dpo\.label_smoothing above 0"):
        DPOConfig(loss_type=DPOLoss.exo_pair)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        DPOConfig(label_smoothing=0.5)
