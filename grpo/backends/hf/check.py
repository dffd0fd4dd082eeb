"""Before a model is trusted to the engine: its logits there beside those of its own forward pass."""

from __future__ import annotations

import torch

from grpo.backends.hf.attention import decoding_into
from grpo.backends.hf.engine import NextLogits
from grpo.backends.hf.kv_cache import DecodeCache, Prefill, Shape
from grpo.errors import RunError
from grpo.model.scored_lm import ScoredLM

PROMPTS = (40, 21, 33)  # lengths: too long for rows to begin with a copy
PROMPT_OF_ROWS = (0, 1, 0, 2, 1)
ROOM = Shape(prompts=5, prompt_tokens=40, rows=6, row_tokens=80)  # for more: a graph computes those as well
STEPS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the logits' range


@torch.no_grad()
def bytes_per_token(model: ScoredLM, device: torch.device, step: NextLogits) -> int:
    """What one token's keys and values take, over all layers. A few made-up tokens are decoded to find out.

    Raises:
        RunError: the engine's logits are not the model's own.
    """
    ids = _made_up_ids(model, device)
    cache = DecodeCache(ROOM, device)
    difference, size = 0.0, 0.0
    with decoding_into(model.causal_lm, cache):
        _prefill(model, cache, ids)
        decoded = [step(_tokens_at(ids, t), cache).clone() for t in range(STEPS)]
    for row in range(len(PROMPT_OF_ROWS)):
        own = model.causal_lm(input_ids=_sequence(ids, row)[None], use_cache=False).logits[0, -STEPS:].float()
        ours = torch.stack([logits_BV[row] for logits_BV in decoded]).float()
        difference = max(difference, float((ours - own).abs().max()))
        size = max(size, float(own.max() - own.min()))
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else model.causal_lm.dtype
    if not difference <= TOLERANCE.get(dtype, 0.05) * max(size, 1e-3):
        raise RunError(
            f"{type(model.causal_lm).__name__} decodes to other logits in the hf backend than its own forward pass has "
            f"(by {difference:.3g}; they range over {size:.3g}), so that its layers do something the backend does "
            "not know; use rollout.backend: vllm"
        )
    buffers = [b for layer in cache.layers.values() for b in (layer.row_keys, layer.row_values)]
    return sum(b[0, :, 0].numel() * b.element_size() for b in buffers)


def _made_up_ids(model: ScoredLM, device: torch.device) -> torch.Tensor:
    """Different tokens (rows, longest prompt + STEPS); the prompts of rows that share one are the same."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(len(PROMPT_OF_ROWS) * 64, device=device).view(len(PROMPT_OF_ROWS), 64) * 7 % (vocab - 1)
    for row, prompt in enumerate(PROMPT_OF_ROWS):
        ids[row, : PROMPTS[prompt]] = ids[PROMPT_OF_ROWS.index(prompt), : PROMPTS[prompt]]
    return ids


def _sequence(ids: torch.Tensor, row: int) -> torch.Tensor:
    return ids[row, : PROMPTS[PROMPT_OF_ROWS[row]] + STEPS]


def _prefill(model: ScoredLM, cache: DecodeCache, ids: torch.Tensor) -> None:
    cache.prefill = Prefill([(place, cache.add_prompt(length), length) for place, length in enumerate(PROMPTS)])
    rows = [PROMPT_OF_ROWS.index(prompt) for prompt in range(len(PROMPTS))]
    model.causal_lm.base_model(input_ids=ids[rows, : max(PROMPTS)], use_cache=False)
    cache.prefill = None
    for prompt in PROMPT_OF_ROWS:
        cache.add_row(prompt)


def _tokens_at(ids: torch.Tensor, t: int) -> torch.Tensor:
    return torch.stack([_sequence(ids, row)[PROMPTS[p] + t] for row, p in enumerate(PROMPT_OF_ROWS)])
