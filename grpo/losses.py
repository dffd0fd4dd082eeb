"""Policy losses: pure functions of tensors.

A loss type is three small functions: what each token contributes (``objective``), how contributions are summed over a
micro-batch (``reduce``), and what the sum is divided by (``denominator``), counted over the *whole* optimizer step, all
micro-batches and processes, before the first backward. So the gradient does not depend on how sequences were split
(``bnpo`` alone is defined per micro-batch).

Signs: everything here is a loss to be minimized. Shapes are (B,T) with a float mask that is 1 at tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_LOG_RATIO = 20.0  # exp(20) is far outside every clip range and far inside float32


@dataclass(frozen=True)
class Counts:
    """What an optimizer step holds, over all micro-batches and processes; truncated-and-masked or unscorable ones and
    padding are not counted, groups without signal are."""

    tokens: int
    sequences: int
    micro_batches: int
    max_completion_length: int


def clipped_surrogate(
    ratio_BT: torch.Tensor, advantages_B: torch.Tensor, *, epsilon: float, epsilon_high: float, delta: float | None
) -> torch.Tensor:
    """PPO's pessimistic bound (arXiv:1707.06347, eq. 7), per token: -min(r A, clip(r, 1 - e, 1 + e_high) A).

    ``delta`` bounds r from above where A < 0, which the plain bound does not (dual clip, arXiv:1912.09729).
    """
    advantages_B1 = advantages_B[:, None]
    clipped_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    if delta is not None:
        ratio_BT = ratio_BT.clamp(max=delta)
    return -torch.minimum(ratio_BT * advantages_B1, clipped_BT * advantages_B1)


def sequence_means(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum over sequences of their mean over tokens: every sequence weighs the same, so long ones weigh less a token."""
    return ((loss_BT * mask_BT).sum(1) / mask_BT.sum(1).clamp(min=1.0)).sum()


def token_sum(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Sum over tokens: every token weighs the same."""
    return (loss_BT * mask_BT).sum()


def micro_batch_mean(loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Mean over this micro-batch's tokens."""
    return (loss_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1.0)


@dataclass(frozen=True)
class LossType:
    """One entry of the registry: the three functions of the module's docstring, and where they come from."""

    objective: Callable[..., torch.Tensor]
    reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    denominator: Callable[[Counts], float]
    source: str


LOSSES: dict[str, LossType] = {
    "grpo": LossType(clipped_surrogate, sequence_means, lambda n: n.sequences, "arXiv:2402.03300, eq. 3"),
    "dr_grpo": LossType(
        clipped_surrogate, token_sum, lambda n: n.sequences * n.max_completion_length, "arXiv:2503.20783, listing 1"
    ),
    "dapo": LossType(clipped_surrogate, token_sum, lambda n: n.tokens, "arXiv:2503.14476, eq. 8"),
    "bnpo": LossType(clipped_surrogate, micro_batch_mean, lambda n: n.micro_batches, "TRL's loss_type bnpo"),
}


def kl_k3(logps_BT: torch.Tensor, ref_logps_BT: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference), per token: exp(d) - d - 1 with d = ref - policy; never < 0."""
    difference_BT = (ref_logps_BT - logps_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference_BT.exp() - difference_BT - 1


def importance_ratio(
    old_logps_BT: torch.Tensor, sampler_logps_BT: torch.Tensor, mask_BT: torch.Tensor, *, mode: str
) -> torch.Tensor:
    """How much likelier what was sampled is to the trainer than it was to the sampler, (B,T), without gradient.

    ``token_*`` modes: exp(old - sampler) of each token; ``sequence_*``: that of the whole completion, the product over
    its tokens that count, at every position. Where the mask is 0 the inputs may hold anything, inf and nan included.
    """
    log_ratio_BT = torch.where(mask_BT > 0, old_logps_BT.detach() - sampler_logps_BT, 0.0)
    if mode.startswith("sequence_"):
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def importance_weights(
    old_logps_BT: torch.Tensor,
    sampler_logps_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    mode: str,
    clip_min: float | None,
    clip_max: float,
) -> torch.Tensor:
    """Factors of the surrogate, (B,T), that make up for a sampler which is not quite the policy; without gradient.

    Outside [``clip_min``, ``clip_max``] ``importance_ratio`` is clamped (``*_truncate``; Yao et al. 2025) or replaced
    by 0 (``*_mask``; Liu et al. 2025).
    """
    ratio_BT = importance_ratio(old_logps_BT, sampler_logps_BT, mask_BT, mode=mode)
    low = 0.0 if clip_min is None else clip_min
    # Asking what is outside, rather than inside, lets a nan through to the loss, where it stops the run.
    outside_BT = (ratio_BT < low) | (ratio_BT > clip_max)
    bounded = {"truncate": ratio_BT.clamp(low, clip_max), "mask": ratio_BT.masked_fill(outside_BT, 0.0)}
    return bounded[mode.rpartition("_")[2]]


def policy_loss(
    logps_BT: torch.Tensor,
    old_logps_BT: torch.Tensor | None,
    ref_logps_BT: torch.Tensor | None,
    advantages_B: torch.Tensor,
    mask_BT: torch.Tensor,
    counts: Counts,
    *,
    loss_type: str = "dapo",
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    weights_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's share of the step's loss, and sums for the metrics.

    Args:
        logps_BT: log-probabilities of the tokens under the policy being trained, with gradient; nats.
        old_logps_BT: the same under the policy that the clip range is around. None means on-policy: the old policy is
            the current one, the ratio is 1 and its gradient that of the log-probability.
        ref_logps_BT: the same under the reference model; None where ``beta`` is 0.
        advantages_B: one advantage a sequence.
        mask_BT: 1.0 at tokens that count, else 0.0.
        counts: what the whole optimizer step holds.
        weights_BT: factors of the surrogate (not of the KL penalty, nor in the denominator), finite everywhere:
            ``importance_weights``. None means 1.

    Returns:
        The loss (a scalar; summed over micro-batches and processes it is the step's loss) and, detached, sums over this
        micro-batch's tokens: ``tokens``, ``kl``, ``clip_ratio/low``, ``clip_ratio/high``, ``clip_ratio/region``.
    """
    variant = LOSSES[loss_type]
    high = epsilon if epsilon_high is None else epsilon_high
    # Padding may hold anything, inf and nan included: multiply by the mask only what is finite.
    valid_BT = mask_BT > 0
    logps_BT = torch.where(valid_BT, logps_BT, 0.0)
    old_BT = logps_BT.detach() if old_logps_BT is None else torch.where(valid_BT, old_logps_BT, 0.0)
    ratio_BT = (logps_BT - old_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()

    loss_BT = variant.objective(ratio_BT, advantages_B, epsilon=epsilon, epsilon_high=high, delta=delta)
    if weights_BT is not None:
        loss_BT = loss_BT * weights_BT
    metrics = clip_metrics(ratio_BT.detach(), advantages_B, mask_BT, epsilon, high)
    if ref_logps_BT is not None and beta > 0:
        kl_BT = kl_k3(logps_BT, torch.where(valid_BT, ref_logps_BT, 0.0))
        loss_BT = loss_BT + beta * kl_BT
        metrics["kl"] = (kl_BT.detach() * mask_BT).sum()
    return variant.reduce(loss_BT, mask_BT) / max(variant.denominator(counts), 1), metrics


def clip_metrics(
    ratio_BT: torch.Tensor, advantages_B: torch.Tensor, mask_BT: torch.Tensor, epsilon: float, epsilon_high: float
) -> dict[str, torch.Tensor]:
    """How many tokens the clip took the gradient from: below (A < 0), above (A > 0), and either."""
    advantages_B1 = advantages_B[:, None]
    low_BT = ((ratio_BT < 1 - epsilon) & (advantages_B1 < 0)) * mask_BT
    high_BT = ((ratio_BT > 1 + epsilon_high) & (advantages_B1 > 0)) * mask_BT
    return {
        "tokens": mask_BT.sum(),
        "clip_ratio/low": low_BT.sum(),
        "clip_ratio/high": high_BT.sum(),
        "clip_ratio/region": low_BT.sum() + high_BT.sum(),
    }


def importance_metrics(
    ratio_BT: torch.Tensor, weights_BT: torch.Tensor, mask_BT: torch.Tensor, *, mode: str
) -> dict[str, torch.Tensor]:
    """Smallest, largest and sum of the raw ratios (one a token, or one a sequence: ``count`` says how many), and how
    many tokens got another weight than their ratio."""
    unit_BT = mask_BT > 0
    if mode.startswith("sequence_"):  # the first token that counts stands for its sequence
        unit_BT = unit_BT & (unit_BT.cumsum(1) == 1)
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/min": torch.where(unit_BT, ratio_BT, torch.inf).min(),
        f"{name}/max": torch.where(unit_BT, ratio_BT, 0.0).max(),
        f"{name}/mean": torch.where(unit_BT, ratio_BT, 0.0).sum(),
        f"{name}/count": unit_BT.sum(),
        "sampling/importance_sampling_clipped": ((weights_BT != ratio_BT) * mask_BT).sum(),
    }
