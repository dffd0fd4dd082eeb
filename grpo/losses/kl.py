"""Estimators of KL(policy || reference) from one sample a token (Schulman 2020, joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

import torch

from grpo.losses.tokens import MAX_LOG_RATIO


def kl_estimate(logps_BT: torch.Tensor, ref_logps_BT: torch.Tensor, *, estimator: str = "k3") -> torch.Tensor:
    """KL(policy || reference) per token, (B,T), with d = log pi_ref - log pi:

        k1  -d               no bias, either sign
        k2  d^2 / 2          biased, never < 0
        k3  exp(d) - d - 1   no bias, never < 0

    "Bias" here is that of the value. The gradients, on-policy, for a token given the tokens before it:

        in the loss                          k1: 0          k2: grad KL(pi || ref)    k3: grad KL(ref || pi)
        in the loss, times the ratio         k1, k3: grad KL(pi || ref)               k2: grad E[k2]
        in the reward                        k1: grad KL(pi || ref), of whole completions

    "Times the ratio" is ``use_bias_correction_kl`` (DeepSeek-V3.2, arXiv:2512.02556).
    """
    difference_BT = ref_logps_BT - logps_BT
    if estimator == "k1":
        return -difference_BT
    if estimator == "k2":
        return difference_BT.square() / 2
    if estimator == "k3":
        difference_BT = difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return difference_BT.exp() - difference_BT - 1
    raise ValueError(f"estimator is 'k1', 'k2' or 'k3', not {estimator!r}")
