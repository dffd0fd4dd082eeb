"""Losses of the form -w A log pi, with a weight w that carries no gradient (reinforce, cispo, vespo)."""

from __future__ import annotations

import math

import torch

from grpo.config import AlgorithmConfig
from grpo.losses.tokens import MAX_LOG_RATIO, Tokens

CISPO_HIGH = 5.0  # ScaleRL's epsilon_max (arXiv:2510.13786)
VESPO_LOWEST = math.log(1e-8)  # TRL's and the authors' floor of log w


def reinforce_objective(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """REINFORCE (Williams 1992), per token: -A log pi; (B,T).

    It has no ratio and no clip, so only the first update of a rollout follows the policy gradient. Later ones are
    off-policy and uncorrected.
    """
    return -tokens.advantages * tokens.logps_BT


def cispo_objective(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """CISPO (MiniMax-M1, arXiv:2506.13585, eq. 4), per token: -sg(min(r, epsilon_high)) A log pi; (B,T).

    The clip bounds the weight, so no token loses its gradient. As in TRL and ScaleRL (arXiv:2510.13786),
    ``epsilon_high`` is the upper bound itself, not its distance from 1, and there is no lower bound. None means
    ScaleRL's 5. (TRL then takes ``epsilon``, 0.2, which scales every token by 0.2.)
    """
    return -_cispo_weight(tokens, options) * tokens.advantages * tokens.logps_BT


def _cispo_weight(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    high = CISPO_HIGH if options.epsilon_high is None else options.epsilon_high
    return tokens.ratio_BT.detach().clamp(max=high)


def cispo_metrics(tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    """Tokens with A > 0 whose weight was cut."""
    cut_BT = (_cispo_weight(tokens, options) < tokens.ratio_BT.detach()) & (tokens.advantages > 0)
    return {"cispo_clip_ratio": (cut_BT * tokens.mask_BT).sum()}


def vespo_objective(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    """VESPO (arXiv:2602.10693), per token: -phi(w) A log pi, phi(w) = e^lambda w^k e^(-lambda w), phi(1) = 1; (B,T).

    w is the ratio of the whole completion, policy over sampler: the product of its tokens' ratios and of the sampler
    weights, which are therefore not applied a second time. k and lambda are ``vespo_k_pos`` and ``vespo_lambda_pos``
    where A >= 0, the ``_neg`` ones elsewhere. As in TRL, log w is cut to [log 1e-8, 20].
    """
    return -_vespo_phi(tokens, options) * tokens.advantages_B1 * tokens.logps_BT


@torch.no_grad()
def _vespo_phi(tokens: Tokens, options: AlgorithmConfig) -> torch.Tensor:
    log_w_B1 = (tokens.log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * tokens.mask_BT).sum(1, keepdim=True)
    if tokens.sampler_weights is not None:  # (B,1) is a completion's, to be counted once
        log_weights = tokens.sampler_weights.log().clamp(VESPO_LOWEST, MAX_LOG_RATIO)
        if log_weights.shape == tokens.mask_BT.shape:
            log_weights = log_weights * tokens.mask_BT
        log_w_B1 = log_w_B1 + log_weights.sum(1, keepdim=True)
    log_w_B1 = log_w_B1.clamp(VESPO_LOWEST, MAX_LOG_RATIO)
    better_B1 = tokens.advantages_B1 >= 0
    k_B1 = torch.where(better_B1, options.vespo_k_pos, options.vespo_k_neg)
    lambda_B1 = torch.where(better_B1, options.vespo_lambda_pos, options.vespo_lambda_neg)
    return (lambda_B1 + k_B1 * log_w_B1 - lambda_B1 * log_w_B1.exp()).exp()


def vespo_metrics(tokens: Tokens, options: AlgorithmConfig) -> dict[str, torch.Tensor]:
    """phi of every sequence that counts."""
    counts_B1 = (tokens.mask_BT > 0).any(1, keepdim=True)
    name = "vespo/phi_seq_mean"
    return {name: (_vespo_phi(tokens, options) * counts_B1).sum(), f"{name}/count": counts_B1.sum()}
