"""Top-k, top-p and min-p: which tokens a sampler may draw."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Truncation(NamedTuple):
    """The settings of the recipe's ``rollout`` section with these names."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None

    def __bool__(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or bool(self.min_p)


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
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits_BV
