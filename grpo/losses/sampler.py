"""Corrections for completions whose sampling probabilities differ from those that the trainer computes."""

from __future__ import annotations

import torch

from grpo.losses.tokens import MAX_LOG_RATIO


def importance_ratio(
    old_logps_BT: torch.Tensor, sampler_logps_BT: torch.Tensor, mask_BT: torch.Tensor, *, mode: str
) -> torch.Tensor:
    """The importance ratio, trainer's probability over sampler's, (B,T), without gradient.

    ``token_*`` modes: exp(old - sampler) of each token. ``sequence_*`` modes: the product over the completion's tokens
    that count, repeated at every position. Where the mask is 0 the inputs may hold anything, inf and nan included.
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
    """Factors on the surrogate that correct for the mismatch of sampler and trainer, without gradient; (B,T), or (B,1)
    with ``sequence_*`` modes.

    Outside [``clip_min``, ``clip_max``] ``importance_ratio`` is clamped (``*_truncate``; Yao et al. 2025) or replaced
    by 0 (``*_mask``; Liu et al. 2025). ``token_mask`` with both bounds is IcePop (arXiv:2510.18855).
    """
    ratio = importance_ratio(old_logps_BT, sampler_logps_BT, mask_BT, mode=mode)
    if mode.startswith("sequence_"):
        ratio = ratio[:, :1]
    low = 0.0 if clip_min is None else clip_min
    # Asking what is outside, rather than inside, lets a nan through to the loss, where it stops the run.
    outside = (ratio < low) | (ratio > clip_max)
    bounded = {"truncate": ratio.clamp(low, clip_max), "mask": ratio.masked_fill(outside, 0.0)}
    return bounded[mode.rpartition("_")[2]]


def importance_metrics(
    ratio_BT: torch.Tensor, weights: torch.Tensor, mask_BT: torch.Tensor, *, mode: str
) -> dict[str, torch.Tensor]:
    """Minimum, maximum, sum and sum of squares of the raw ratios, and how many tokens have a weight other than their
    ratio. There is one ratio per token, or one per sequence with ``sequence_*`` modes; ``count`` is their number."""
    unit_BT = mask_BT > 0
    if mode.startswith("sequence_"):  # the first token that counts stands for its sequence
        unit_BT = unit_BT & (unit_BT.cumsum(1) == 1)
    name = "sampling/importance_sampling_ratio"
    counted_BT = torch.where(unit_BT, ratio_BT, 0.0)
    return {
        f"{name}/min": torch.where(unit_BT, ratio_BT, torch.inf).min(),
        f"{name}/max": counted_BT.max(),
        f"{name}/mean": counted_BT.sum(),
        f"{name}/squares": counted_BT.double().square().sum(),
        f"{name}/count": unit_BT.sum(),
        "sampling/importance_sampling_clipped": ((weights != ratio_BT) * mask_BT).sum(),
    }


def off_policy_kept(
    advantages_B1: torch.Tensor,
    logps_BT: torch.Tensor,
    sampler_logps_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    threshold: float,
) -> torch.Tensor:
    """0 for sequences that are both bad and off-policy, 1 for others; (B,1), without gradient.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556, eq. 9): 0 where A < 0 and the mean over tokens of
    log mu - log pi is above ``threshold``. mu is the sampler's probability.
    """
    difference_BT = torch.where(mask_BT > 0, sampler_logps_BT - logps_BT.detach(), 0.0)
    drift_B = difference_BT.sum(1) / mask_BT.sum(1).clamp(min=1.0)
    return (~((advantages_B1 < 0) & (drift_B[:, None] > threshold))).to(mask_BT.dtype)
