"""Drawing tokens: one uniform number a token, inverted through the cumulative distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from grpo.model.truncation import truncate

if TYPE_CHECKING:
    from grpo.backends.base import Sampling

BLOCK = 256  # tokens
LARGEST_SHARE = 1 - 2.0**-32  # times a sum in float64, it is less than the sum


class Distribution(NamedTuple):
    """The part of ``Sampling`` that a draw depends on."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None

    @classmethod
    def of(cls, sampling: Sampling) -> Distribution:
        return cls(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)

    def draw(self, logits_BV: torch.Tensor, uniforms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B,) and their log-probabilities (B,): ``sample``."""
        return sample(logits_BV, uniforms_B, **self._asdict())


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
    the likeliest token, with log-probability 0. Logits of nan give a log-probability of nan.
    """
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros_like(tokens_B, dtype=torch.float32)
    logits_BV = logits_BV.float()
    if temperature != 1:
        logits_BV = logits_BV / temperature
    probabilities_BV = truncate(logits_BV, top_k=top_k, top_p=top_p, min_p=min_p).softmax(-1)
    tokens_B1 = _invert(probabilities_BV, uniforms_B[:, None])
    return tokens_B1[:, 0], probabilities_BV.gather(1, tokens_B1)[:, 0].log()


def _invert(probabilities_BV: torch.Tensor, uniforms_B1: torch.Tensor) -> torch.Tensor:
    """The first tokens (B,1) whose cumulative probability exceeds the uniform number times the total.

    Sums over blocks of the vocabulary are accumulated first and then one block's tokens: the vocabulary is read once,
    where a cumulative sum over all of it takes ten times as long as the softmax before it.
    """
    sums_BK = _block_sums(probabilities_BV)
    upto_BK = sums_BK.cumsum(-1, dtype=torch.float64)
    points_B1 = uniforms_B1 * upto_BK[:, -1:]
    block_B1 = torch.searchsorted(upto_BK, points_B1, right=True).clamp(max=upto_BK.shape[1] - 1)  # of nan: any
    sum_B1 = sums_BK.gather(1, block_B1).double()
    share_B1 = ((points_B1 - upto_BK.gather(1, block_B1) + sum_B1) / sum_B1).clamp(0, LARGEST_SHARE)

    V = probabilities_BV.shape[-1]
    places_Bb = block_B1 * BLOCK + torch.arange(BLOCK, device=block_B1.device)
    inside_Bb = probabilities_BV.gather(1, places_Bb.clamp(max=V - 1)).masked_fill(places_Bb >= V, 0.0)
    cumulative_Bb = inside_Bb.cumsum(-1, dtype=torch.float64)
    token_B1 = block_B1 * BLOCK + torch.searchsorted(cumulative_Bb, share_B1 * cumulative_Bb[:, -1:], right=True)
    return token_B1.clamp(max=V - 1)


def _block_sums(probabilities_BV: torch.Tensor) -> torch.Tensor:
    """Sums (B,K) over blocks of ``BLOCK`` tokens. The last block may be shorter."""
    whole = probabilities_BV.shape[-1] // BLOCK * BLOCK
    sums_BK = probabilities_BV[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).sum(-1)
    if whole == probabilities_BV.shape[-1]:
        return sums_BK
    return torch.cat([sums_BK, probabilities_BV[:, whole:].sum(-1, keepdim=True)], dim=1)
