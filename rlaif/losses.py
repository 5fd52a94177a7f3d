"""The maths of preference models, DPO and PPO as pure tensor functions.

Shapes: B examples, T completion tokens. Masks are 1.0 on completion tokens and 0.0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def soft_bradley_terry(margin: Tensor, p_chosen: Tensor) -> Tensor:
    """Cross entropy between a soft label and the Bradley-Terry probability of a score margin.

    -[p log sigmoid(m) + (1 - p) log sigmoid(-m)]; with p = 1 it is eq. 1 of Ouyang et al. (2022), the soft form is
    the one of Lee et al. (2023), section 2.2.

    Args:
        margin: (B,) score of chosen minus score of rejected.
        p_chosen: (B,) probability that chosen is better.

    Returns:
        (B,) losses.
    """
    return -(p_chosen * F.logsigmoid(margin) + (1 - p_chosen) * F.logsigmoid(-margin))


def token_logps(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token, in float32.

    Args:
        logits: (..., V), already divided by the sampling temperature.
        tokens: (...).

    Returns:
        (...).
    """
    return _TokenLogps.apply(logits.float(), tokens)


class _TokenLogps(torch.autograd.Function):
    """log_softmax and gather in as few passes over the logits as there can be, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        logps = torch.log_softmax(logits, dim=-1)
        ctx.save_for_backward(logps, tokens)
        return logps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logps, tokens = ctx.saved_tensors
        (gradient,) = (each.unsqueeze(-1) for each in gradients)
        return logps.exp().mul_(-gradient).scatter_add_(-1, tokens.unsqueeze(-1), gradient), None


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each next-token distribution: (B, T, V) -> (B, T)."""
    logps = torch.log_softmax(logits.float(), dim=-1)
    return -(logps.exp() * logps).sum(dim=-1)


def state_logps(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    max_logits: int = 2**23,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy, from the states that the output head reads.

    The same numbers as ``token_logps(head(states) / temperature, tokens)``, but logits are made for a few positions
    at a time. What the backward pass needs of them is kept for up to four such pieces; of more it is made again, so
    that N x V numbers are never held.

    Args:
        states: (N, H).
        head: (n, H) -> (n, V) logits.
        tokens: (N,).
        temperature: divides the logits.
        with_entropy: also return entropies; zeros otherwise.
        max_logits: size of a piece.

    Returns:
        log-probabilities and entropies, each (N,), in float32.
    """

    def piece(states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        if temperature != 1:
            logits = logits / temperature
        logps = token_logps(logits, tokens)
        return logps, entropy(logits) if with_entropy else torch.zeros_like(logps)

    with torch.no_grad():
        vocabulary = head(states[:1]).shape[-1]
    size = max(max_logits // vocabulary, 1)
    pairs = zip(states.split(size), tokens.split(size), strict=True)
    if torch.is_grad_enabled() and len(states) * vocabulary > 4 * max_logits:
        pieces = [checkpoint(piece, *pair, use_reentrant=False) for pair in pairs]
    else:
        pieces = [piece(*pair) for pair in pairs]
    logps, entropies = zip(*pieces, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all positions where the mask is 1: (B, T), (B, T) -> scalar."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance over completion tokens; ``shift_mean=False`` keeps the mean (rewards).

    Huang et al. (2024), "The N Implementation Details of RLHF with PPO", details 9 and 18. Masked positions of
    the result are 0.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def kl_k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Signed, unbiased estimate of KL(policy || reference) from the policy's own samples: log p - log q.

    Schulman (2020), "Approximating KL divergence". Single values may be negative; do not clamp them.
    """
    return logps - ref_logps


def kl_k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Non-negative, biased, low-variance estimate: (log p - log q)^2 / 2 (Schulman 2020).

    It agrees with the KL to second order in log p - log q, so only where policy and reference are close.
    """
    return 0.5 * (logps - ref_logps) ** 2


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Non-negative, unbiased, low-variance estimate: (q/p - 1) - log(q/p) (Schulman 2020)."""
    log_ratio = ref_logps - logps
    return torch.expm1(log_ratio) - log_ratio


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token reward: -kl_coef * kl everywhere, plus the score at the last completion token.

    Ziegler et al. (2019), eq. 2, spread over tokens as in Ouyang et al. (2022), section 3.5.

    Args:
        scores: (B,) one score per completion.
        kl: (B, T) per-token KL estimate.
        mask: (B, T); completions are right-padded and not empty.

    Returns:
        (B, T), zero where the mask is zero.
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(dim=-1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16) over right-padded episodes that end.

    delta_t = r_t + gamma * V_{t+1} - V_t, A_t = delta_t + gamma * lambda * A_{t+1}; the value after the last
    completion token is 0.

    Args:
        rewards: (B, T).
        values: (B, T) value before each token.
        mask: (B, T).
        gamma: discount.
        gae_lambda: trade-off between bias (0) and variance (1).

    Returns:
        advantages (B, T) and returns (B, T) = advantages + values; both 0 where the mask is 0.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for step in reversed(range(rewards.shape[1])):
        next_value = values[:, step + 1] if step + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        following = (delta + gamma * gae_lambda * following) * mask[:, step]
        advantages[:, step] = following
    return advantages, (advantages + values) * mask


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (Schulman et al. 2017, eq. 7), to be minimised.

    Args:
        logps, old_logps, advantages, mask: (B, T).
        clip_range: epsilon.

    Returns:
        (B, T) loss per token, and (B, T) 1.0 where the clipped branch was taken.
    """
    ratio = torch.exp(logps - old_logps)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(plain, clipped) * mask, (clipped > plain).float() * mask


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Clipped value loss, half the larger squared error (Huang et al. 2024, detail 13): (B, T) -> (B, T)."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values account for: 1 - Var(returns - values) / Var(returns).

    1 is a perfect value function, 0 as good as a constant, below 0 worse; 0 where the returns do not vary.
    (B, T) each -> scalar.
    """

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    total = variance(returns)
    return torch.where(total > 1e-12, 1 - variance(returns - values) / total.clamp(min=1e-12), 0.0)


def dpo_margin(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Implicit reward margin of DPO: beta * [(log pi/ref of chosen) - (log pi/ref of rejected)].

    Rafailov et al. (2023), eq. 6-7. DPO's loss on soft labels is ``soft_bradley_terry`` of this margin.

    Args:
        logps, ref_logps: (B, 2) summed log-probabilities of chosen and rejected.

    Returns:
        (B,).
    """
    log_ratio = logps - ref_logps
    return beta * (log_ratio[:, 0] - log_ratio[:, 1])


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next KL coefficient of proportional control (Ziegler et al. 2019, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2); kl_coef * (1 + e * episodes / horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
