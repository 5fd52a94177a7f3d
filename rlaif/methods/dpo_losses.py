"""DPO's losses on a pair as pure tensor functions, and their form for soft labels.

A loss takes the log-ratios log(pi / ref) of both completions, summed over tokens. Names and definitions are those of
TRL's DPOTrainer; each docstring names the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from rlaif.config import DPOLoss

_DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class Ratios:
    """Pairs: log-ratios (P,) of chosen and rejected, and their lengths (P,) in tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    def swapped(self) -> Ratios:
        """The same pairs with the opposite label."""
        return Ratios(self.rejected, self.chosen, self.rejected_length, self.chosen_length)

    def difference(self) -> Tensor:
        """(P,) log-ratio of chosen minus that of rejected."""
        return self.chosen - self.rejected

    def difference_per_token(self) -> Tensor:
        """The same with each log-ratio divided by its length."""
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


def soft_dpo_loss(kind: DPOLoss, ratios: Ratios, p_chosen: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """p * loss(chosen, rejected) + (1 - p) * loss(rejected, chosen): the expected loss under the soft label.

    Args:
        kind: the loss.
        ratios: P pairs.
        p_chosen: (P,) probability that chosen is better.
        beta: strength of the implicit KL constraint.
        smoothing: for ``robust`` and ``exo_pair``.

    Returns:
        (P,).
    """
    loss = LOSSES[kind]
    return p_chosen * loss(ratios, beta, smoothing) + (1 - p_chosen) * loss(ratios.swapped(), beta, smoothing)


def sigmoid(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """-log sigmoid(margin) (Rafailov et al. 2023, eq. 7)."""
    return -F.logsigmoid(beta * ratios.difference())


def sigmoid_norm(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """The same with log-ratios per token (Lambert et al. 2024, section 5)."""
    return -F.logsigmoid(beta * ratios.difference_per_token())


def hinge(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """max(0, 1 - margin) (Zhao et al. 2023, SLiC-HF, on DPO's margin)."""
    return torch.relu(1 - beta * ratios.difference())


def ipo(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """(difference - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17), with log-ratios per token as in TRL."""
    return (ratios.difference_per_token() - 1 / (2 * beta)) ** 2


def exo_pair(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """KL of the pair's model distribution to the smoothed label (Ji et al. 2024, eq. 16)."""
    margin = beta * ratios.difference()
    wins, loses = F.logsigmoid(margin), F.logsigmoid(-margin)
    epsilon = torch.tensor(smoothing, dtype=margin.dtype, device=margin.device)
    return wins.exp() * (wins - torch.log1p(-epsilon)) + loses.exp() * (loses - epsilon.log())


def nca_pair(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Noise contrastive alignment of a pair (Chen et al. 2024, NCA)."""
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Unbiased under labels of which a share ``smoothing`` is flipped (Chowdhury et al. 2024, eq. 12)."""
    margin = beta * ratios.difference()
    return (-(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin)) / (1 - 2 * smoothing)


def bco_pair(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Binary classification of both completions (Jung et al. 2024), without its moving reward shift."""
    return -F.logsigmoid(beta * ratios.chosen) - F.logsigmoid(-beta * ratios.rejected)


def sppo_hard(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Squared errors to +-1 / (2 beta) (Wu et al. 2024, eq. 4.7, with a hard label)."""
    return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2


def apo_zero(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Chosen up and rejected down (D'Oosterlinck et al. 2024, eq. 7): chosen is better than the policy's own."""
    return 1 - torch.sigmoid(beta * ratios.chosen) + torch.sigmoid(beta * ratios.rejected)


def apo_down(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Both down, rejected more (D'Oosterlinck et al. 2024, eq. 8): chosen is worse than the policy's own."""
    return torch.sigmoid(beta * ratios.chosen) + 1 - torch.sigmoid(beta * ratios.difference())


def discopop(ratios: Ratios, beta: float, smoothing: float) -> Tensor:
    """Logistic and exponential loss, blended by the margin (Lu et al. 2024, eq. 5).

    Not convex: near a margin of zero, where training starts, its gradient pulls the pair together.
    """
    margin = beta * ratios.difference()
    blend = torch.sigmoid(margin / _DISCOPOP_TAU)
    return -F.logsigmoid(margin) * (1 - blend) + torch.exp(-margin) * blend


LOSSES = {
    DPOLoss.sigmoid: sigmoid,
    DPOLoss.sigmoid_norm: sigmoid_norm,
    DPOLoss.hinge: hinge,
    DPOLoss.ipo: ipo,
    DPOLoss.exo_pair: exo_pair,
    DPOLoss.nca_pair: nca_pair,
    DPOLoss.robust: robust,
    DPOLoss.bco_pair: bco_pair,
    DPOLoss.sppo_hard: sppo_hard,
    DPOLoss.apo_zero: apo_zero,
    DPOLoss.apo_down: apo_down,
    DPOLoss.discopop: discopop,
}
