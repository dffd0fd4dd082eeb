"""Log-probabilities and entropies of given tokens, from hidden states, never holding (B,T,V).

Logits are the largest tensor of a language model's update: 16 sequences of 1,024 tokens over 152,000 words are 10 GB in
float32, before their gradient. Here they exist for one chunk of positions at a time, in the forward and, recomputed,
in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# Numbers of logits held at once: 64 MB in float32. Not much smaller: under 32 MB glibc keeps freed blocks in its heap,
# which fragments until the process holds far more than it uses.
CHUNK_LOGITS = 16 * 1024 * 1024

Head = Callable[[torch.Tensor], torch.Tensor]


def token_logprobs(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target, and the entropy of the distribution it is judged under, both float32 (N,), nats.

    ``hidden_NH`` are the last hidden states at the N positions that *predict* the targets (the position before each).
    ``head`` maps (n,H) to logits (n,V). Logits are divided by ``temperature``, so that the result describes the
    distribution that sampling at that temperature draws from. Entropies carry no gradient.
    """
    chunk = max(1, CHUNK_LOGITS // vocab_size)
    logps, entropies = [], []
    for start in range(0, max(len(targets_N), 1), chunk):
        piece = slice(start, start + chunk)
        logps_n, entropy_n = checkpoint(
            _chunk_logprobs, hidden_NH[piece], targets_N[piece], head, temperature, use_reentrant=False
        )
        logps.append(logps_n)
        entropies.append(entropy_n)
    return torch.cat(logps), torch.cat(entropies)


def _chunk_logprobs(
    hidden_nH: torch.Tensor, targets_n: torch.Tensor, head: Head, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_nV = head(hidden_nH).float() / temperature
    normalizer_n = torch.logsumexp(logits_nV, dim=-1)
    logps_n = logits_nV.gather(1, targets_n[:, None])[:, 0] - normalizer_n
    with torch.no_grad():  # H = log Z - E[logit]
        probabilities_nV = torch.softmax(logits_nV, dim=-1)
        entropy_n = normalizer_n - (probabilities_nV * logits_nV).sum(-1)
    return logps_n, entropy_n
