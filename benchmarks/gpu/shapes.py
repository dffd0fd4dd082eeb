"""Models of the sizes that people train, with random weights: made on the spot, without a hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT

QWEN = {"num_key_value_heads": 2, "tie_word_embeddings": True, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {  # of Qwen2.5
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
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


@contextmanager
def model_folder(shape: str, device: str) -> Iterator[Path]:
    """A folder that ``from_pretrained`` loads: random weights in bfloat16, and the tiny model's tokenizer. It has fewer
    ids than the model, but nobody reads the samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_base")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, **ends)
    folder = Path(tempfile.mkdtemp(prefix=f"qwen_{shape}_"))
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        yield folder
    finally:
        shutil.rmtree(folder)


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
