"""Drawing tokens: one uniform number a token, inverted through the cumulative distribution."""

from __future__ import annotations

import torch


def truncate(
    logits_BV: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0, min_p: float | None = None
) -> torch.Tensor:
    """Logits (B,V) with the tokens that truncation drops at -inf; in transformers' order: top-k, top-p, min-p."""
    if 0 < top_k < logits_BV.shape[-1]:
        kept_BK = logits_BV.topk(top_k, dim=-1).indices
        logits_BV = torch.full_like(logits_BV, -torch.inf).scatter(1, kept_BK, logits_BV.gather(1, kept_BK))
    if top_p < 1.0:  # nucleus (arXiv:1904.09751): the smallest set of likeliest tokens with mass >= top_p
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        probabilities_BV = sorted_BV.softmax(-1)
        before_BV = probabilities_BV.cumsum(-1) - probabilities_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
    if min_p:  # arXiv:2407.01082
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, keepdim=True) + _log(min_p), -torch.inf)
    return logits_BV


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


def sample(
    logits_BV: torch.Tensor,
    uniforms_B: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B,) and their log-probabilities (B,) under the distribution they were drawn from.

    The token is the first whose cumulative probability exceeds the uniform number times the total mass: tokens of
    probability 0 are never drawn, and equal uniforms give equal tokens unless one lies within rounding of a boundary.
    ``uniforms_B`` is float64 in [0, 1), in multiples of 2**-32 (see ``randomness.uniforms``). ``temperature`` 0 takes
    the likeliest token, with log-probability 0.
    """
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros_like(tokens_B, dtype=torch.float32)
    logits_BV = truncate(logits_BV.float() / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logps_BV = logits_BV.log_softmax(-1)
    cumulative_BV = logps_BV.exp().cumsum(-1, dtype=torch.float64)
    points_B1 = uniforms_B[:, None] * cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, points_B1, right=True)
    return tokens_B1[:, 0], logps_BV.gather(1, tokens_B1)[:, 0]
