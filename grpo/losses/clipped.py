"""Losses that bound the ratio: by a hard clip of the surrogate (grpo, dr_grpo, dapo, bnpo, gspo, luspo, rloo, ...), or
by a soft gate (sapo)."""

from __future__ import annotations

import torch

from grpo.config import AlgorithmConfig
from grpo.losses.tokens import MAX_LOG_RATIO, Tokens


def clipped_surrogate(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """PPO's pessimistic bound (arXiv:1707.06347, eq. 7), per token: -min(r A, clip(r, 1 - e, 1 + e_high) A); (B,T).

    ``delta`` bounds r from above where A < 0, which the plain bound does not (dual clip, arXiv:1912.09729). r is the
    ratio at the recipe's ``importance_sampling_level``: with ``sequence`` this is GSPO's (arXiv:2507.18071, eq. 5).
    """
    return _pessimistic(tokens.ratio_BT, tokens.advantages, options)


def completion_surrogate(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """The same bound with one ratio per completion, the product over its tokens, repeated at each of them; (B,T).

    REINFORCE leave-one-out (arXiv:2402.14740) treats a completion as one action: on-policy the gradient is
    -A grad log pi(completion). The clip, for several updates per rollout, is that of TRL's RLOOTrainer. This is not the
    sequence ratio of ``importance_sampling_level``, which is a geometric mean.
    """
    return _pessimistic(_completion_ratio(tokens), tokens.advantages_B1, options).expand_as(tokens.ratio_BT)


def _completion_ratio(tokens: Tokens) -> torch.Tensor:
    log_ratio_B1 = (tokens.log_ratio_BT * tokens.mask_BT).sum(1, keepdim=True)
    return log_ratio_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _pessimistic(ratio: torch.Tensor, advantages: torch.Tensor, options: AlgorithmConfig) -> torch.Tensor:
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.high)
    if options.delta is not None:
        ratio = ratio.clamp(max=options.delta)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def sapo_objective(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """SAPO (arXiv:2511.20347), per token: -(4 / tau) sigmoid(tau (r - 1)) A; (B,T).

    tau is ``sapo_temperature_pos`` where A > 0, ``sapo_temperature_neg`` elsewhere. At r = 1 the gradient is
    REINFORCE's; away from it, on either side, it fades.
    """
    advantages = tokens.advantages
    tau = torch.full_like(advantages, options.sapo_temperature_neg)
    tau[advantages > 0] = options.sapo_temperature_pos
    return -(tau * (tokens.ratio_BT - 1)).sigmoid() * 4 / tau * advantages


def clip_metrics(tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    """Tokens whose gradient the clip removed: ratio below the range (A < 0), above it (A > 0), and both together."""
    return _clipped(tokens.ratio_BT.detach(), tokens, options)


def completion_clip_metrics(tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    """The same for the completion's ratio, still counted in tokens."""
    return _clipped(_completion_ratio(tokens).detach(), tokens, options)


def _clipped(ratio: torch.Tensor, tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    low_BT = ((ratio < 1 - options.epsilon) & (tokens.advantages < 0)) * tokens.mask_BT
    high_BT = ((ratio > 1 + options.high) & (tokens.advantages > 0)) * tokens.mask_BT
    return {
        "clip_ratio/low": low_BT.sum(),
        "clip_ratio/high": high_BT.sum(),
        "clip_ratio/region": low_BT.sum() + high_BT.sum(),
    }
