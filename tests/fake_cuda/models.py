"""Models at the widths of those that people train, with two layers. `make test` has the smallest alone."""

from __future__ import annotations

import os
from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config, Qwen3Config

QWEN25 = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 2},
}
LAYERS = {"0.5B": 24, "1.5B": 28, "3B": 36}


def qwen25(size: str, layers: int = 2) -> Qwen2Config:
    return Qwen2Config(vocab_size=151936, tie_word_embeddings=True, num_hidden_layers=layers, **QWEN25[size])


def _small(**shape: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 2, "tie_word_embeddings": True} | shape


CONFIGS = {
    "small": Qwen2Config(
        **_small(vocab_size=997, hidden_size=64, intermediate_size=96, num_attention_heads=4), num_key_value_heads=2
    ),
    "Qwen2.5 0.5B": qwen25("0.5B"),
    "Qwen2.5 3B": qwen25("3B"),
    "Qwen3 0.6B": Qwen3Config(
        **_small(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_attention_heads=16),
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Llama 3.2 1B": LlamaConfig(
        **_small(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32),
        num_key_value_heads=8,
        head_dim=64,
    ),
    "Gemma 3 1B": Gemma3TextConfig(
        **_small(vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4),
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
}


def packs(config: Any) -> bool:
    """Whether a model of this configuration computes packed rows; ``packed_check`` finds it with numbers."""
    return set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


TRIED = list(CONFIGS) if os.environ.get("GRPO_FAKE_CUDA") == "all" else ["small"]
