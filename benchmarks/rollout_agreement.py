"""Whether a completion depends on its batch: compared with the model's own forward pass and with sampling it alone."""

from __future__ import annotations

import numpy as np
import torch

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.randomness import uniforms


def agreement(backend: HFBackend, requests: list[Request], length: int, checked: int) -> dict[str, float]:
    """Three figures of a rollout. (1) The largest difference, in nats, of a sampled token's log-probability from the
    model's own forward pass. (2) How many of the first ``checked`` completions differ when sampled alone with the same
    key. (3) The largest ``boundary_distance`` of these."""
    groups = backend.generate(requests, Sampling(length), 0)
    samples = [
        (request, key, c) for request, group in zip(requests, groups, strict=True)
        for key, c in zip(request.keys, group, strict=True)
    ]  # fmt: skip
    difference, differing, distance = 0.0, 0, 0.0
    for request, _, c in samples:
        logps_TV = forced_logprobs(backend, request, c.token_ids)
        ours = torch.tensor(c.sampler_logprobs, dtype=torch.float64)
        difference = max(difference, float((logps_TV[range(len(ours)), c.token_ids] - ours).abs().max()))
    for request, key, c in samples[:checked]:
        ((alone,),) = backend.generate([Request(request.prompt, [key])], Sampling(length), 0)
        if alone.token_ids != c.token_ids:
            differing += 1
            distance = max(distance, boundary_distance(backend, request, key, c.token_ids, alone.token_ids))
    return {
        "completions": len(samples),
        "logprob_difference": difference,
        "sampled_alone": min(checked, len(samples)),
        "differing": differing,
        "largest_boundary_distance": distance,
    }


@torch.no_grad()
def forced_logprobs(backend: HFBackend, request: Request, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities (T,V), in float64, of every token at each place of a completion, by a plain forward pass."""
    ids = torch.tensor([request.prompt.token_ids + token_ids], device=backend.device)
    was_training = backend.model.training
    backend.model.eval()
    logits_TV = backend.model(input_ids=ids, use_cache=False, logits_to_keep=len(token_ids) + 1).logits[0, :-1]
    backend.model.train(was_training)
    return logits_TV.double().log_softmax(-1).cpu()


def boundary_distance(backend: HFBackend, request: Request, key: int, together: list[int], alone: list[int]) -> float:
    """At the first token that differs, how far its uniform number lies outside of one of the two tokens' shares.

    A token's share of [0, 1) starts at the summed probabilities of the tokens before it in the vocabulary, and is as
    long as its own probability.
    """
    t = next((i for i, (a, b) in enumerate(zip(together, alone, strict=False)) if a != b), None)
    if t is None:
        return 1.0  # one ends where the other goes on, after equal tokens: no rounding explains that
    u = float(uniforms([key], np.array([t]))[0, 0])
    after_V = forced_logprobs(backend, request, together[: t + 1])[t].exp().cumsum(0)
    after_V = after_V / after_V[-1]
    return max(_outside(u, after_V, token) for token in (together[t], alone[t]))


def _outside(u: float, after_V: torch.Tensor, token: int) -> float:
    low = float(after_V[token - 1]) if token > 0 else 0.0
    return max(low - u, u - float(after_V[token]), 0.0)
