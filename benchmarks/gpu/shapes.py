"""The sizes that people train: what a pass over them has to compute, read and keep."""

from __future__ import annotations

from typing import Any

from grpo.model.shape import shape_of

QWEN = {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "tiny": {
        "hidden_size": 128,  # heads of 32, for which packed attention is compiled on every CPU
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        **QWEN,
        "vocab_size": 1024,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        **QWEN,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        **QWEN,
    },
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        **QWEN,
    },
}

STATE_BYTES = 16  # a parameter: float32 weight, gradient and AdamW's two moments


def counts(shape: str) -> dict[str, int]:
    """Numbers of weights: in the layers' matrices, and in the head (which is the embedding too)."""
    s = SHAPES[shape]
    head_size = s["hidden_size"] // s["num_attention_heads"]
    width = (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * head_size
    layer = s["hidden_size"] * (width + 3 * s["intermediate_size"])
    return {"layers": layer * s["num_hidden_layers"], "head": s["hidden_size"] * s["vocab_size"]}


def cache_bytes_per_token(shape: str, size: int = 2) -> int:
    """Keys and values of one token over all layers, ``size`` bytes a number."""
    s = SHAPES[shape]
    head_size = s["hidden_size"] // s["num_attention_heads"]
    return 2 * s["num_hidden_layers"] * s["num_key_value_heads"] * head_size * size


def expected_update_gb(shape: str, tokens: int, *, checkpointing: bool) -> float | None:
    """Memory of an update with micro-batches of ``tokens``: weights, gradients, AdamW's moments, what the backward pass
    needs, and the embedding's gradient of one micro-batch. None for a shape whose kept bytes nobody has counted."""
    known = shape_of(f"qwen2.5-{shape}")
    if known is None:
        return None
    kept = tokens * known.kept_token(checkpointing=checkpointing)
    return (STATE_BYTES * known.parameters + kept + 4 * known.embedding) / 1e9


def training_flops(shape: str, prompts: list[int], completions: list[list[int]]) -> tuple[float, float]:
    """Floating-point operations of forward and backward pass, nothing computed twice: with each prompt once, and with
    it once for each completion. The head sees completion tokens alone; attention is causal."""
    n, s = counts(shape), SHAPES[shape]

    def attention(before: int, tokens: int) -> float:  # scores and their use: 2 products over the tokens before
        return 4 * s["num_hidden_layers"] * s["hidden_size"] * (before * tokens + tokens * (tokens + 1) / 2)

    def forward(prompt: int, group: list[int], copies: int) -> float:
        tokens = copies * prompt + sum(group)
        flops = 2.0 * n["layers"] * tokens + 2.0 * n["head"] * sum(group) + copies * attention(0, prompt)
        return flops + sum(attention(prompt, c) for c in group)

    once = sum(forward(p, group, 1) for p, group in zip(prompts, completions, strict=True))
    each = sum(forward(p, group, len(group)) for p, group in zip(prompts, completions, strict=True))
    return 3 * once, 3 * each
