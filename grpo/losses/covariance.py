"""Clip-Cov and KL-Cov: losses that restrain the tokens with the highest covariance of log-probability and advantage.

Those tokens drive the entropy down (Cui et al., arXiv:2505.22617). They are chosen among all valid tokens of the
optimizer step, before its first backward pass, so that micro-batches and processes do not matter. (The authors' code
chooses within a micro-batch.)
"""

from __future__ import annotations

import torch

from grpo.config import AlgorithmConfig
from grpo.losses.tokens import StepTokens, Tokens


def covariances(step: StepTokens) -> torch.Tensor:
    """(log pi - mean) (A - mean) of each token; their mean is the covariance."""
    return (step.logps_M - step.logps_M.mean()) * (step.advantages_M - step.advantages_M.mean())


def clip_cov_selection(step: StepTokens, options: AlgorithmConfig, generator: torch.Generator) -> torch.Tensor:
    """0 at tokens that lose their gradient, 1 elsewhere.

    As many as ``clip_cov_ratio`` of all tokens are drawn. They come from the tokens that have a covariance between
    ``clip_cov_lb`` and ``clip_cov_ub`` and are not already clipped by their ratio.
    """
    ratio_M, positive_M = step.log_ratio_M.exp(), step.advantages_M > 0
    clipped_M = torch.where(positive_M, ratio_M > 1 + options.high, ratio_M < 1 - options.epsilon)
    cov_M = covariances(step)
    candidates_N = ((cov_M > options.clip_cov_lb) & (cov_M < options.clip_cov_ub) & ~clipped_M).nonzero()[:, 0]
    number = max(int(options.clip_cov_ratio * len(cov_M)), 1)
    kept_M = torch.ones_like(cov_M)
    kept_M[candidates_N[torch.randperm(len(candidates_N), generator=generator)[:number]]] = 0.0
    return kept_M


def kl_cov_selection(step: StepTokens, options: AlgorithmConfig, generator: torch.Generator) -> torch.Tensor:
    """0 at the tokens with the largest covariance (``kl_cov_ratio`` of all, at least one), 1 elsewhere."""
    cov_M = covariances(step)
    kept_M = torch.ones_like(cov_M)
    kept_M[cov_M.topk(min(max(int(options.kl_cov_ratio * len(cov_M)), 1), len(cov_M))).indices] = 0.0
    return kept_M


def kl_cov_objective(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """KL-Cov (arXiv:2505.22617), per token: -r A, plus ``ppo_kl_coef`` |log pi - log pi_old| at those selected; (B,T).

    Nothing is clipped. The penalty is the absolute log-ratio, as in the authors' code. It has no gradient while the
    policy is still the old one, so it acts from the second update of a rollout on.
    """
    selected_BT = 1.0 - tokens.kept_BT if tokens.kept_BT is not None else torch.zeros_like(tokens.mask_BT)
    penalty_BT = options.ppo_kl_coef * tokens.log_ratio_BT.abs()
    return -tokens.ratio_BT * tokens.advantages + selected_BT * penalty_BT
