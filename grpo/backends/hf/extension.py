"""Several new tokens of sequences that are in the cache, in one forward pass: what an environment answered."""

from __future__ import annotations

import torch

from grpo.backends.hf.kv_cache import DecodeCache
from grpo.model.logprob_lm import LogprobLM

MOST_SCORES = 1 << 22  # of one head in one pass: new tokens times the tokens that they may see


def extend(model: LogprobLM, cache: DecodeCache, places: list[int], tokens: list[list[int]]) -> torch.Tensor:
    """The logits (B,V) behind new tokens of the running sequences at ``places``, which the cache takes up.

    A new token sees its prompt, what its sequence held, and the new ones before it. Call it within ``decoding_into``.
    """
    counts = [len(new) for new in tokens]
    T, device = max(counts), cache.device
    ids_BT = torch.tensor([new + [0] * (T - len(new)) for new in tokens], device=device)
    extension = cache.begin_extension(places, counts)
    hidden_BTH = model.body(
        input_ids=ids_BT,
        position_ids=extension.positions_BT,
        attention_mask=model.no_mask(device),
        use_cache=False,
    ).last_hidden_state
    cache.extension = None
    return model.head(hidden_BTH[list(range(len(places))), [count - 1 for count in counts]])
