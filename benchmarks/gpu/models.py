"""Models of a size with random weights, and policies that load them as the trainer does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config
from transformers.initialization import no_init_weights

from benchmarks.common import ROOT
from benchmarks.gpu.shapes import SHAPES, counts
from grpo.config import Recipe
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy
from grpo.run.session import make_accelerator

TOKENIZER = ROOT / "data/tiny_base"  # has fewer ids than the models, but nobody reads the samples
BLOCK = 2**20  # random numbers; weights repeat them, because drawing 3 billion takes minutes
MEMORY = Path("/dev/shm")  # a folder in memory: 6 GB written and read back in seconds


def config_of(shape: str) -> Qwen2Config:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return Qwen2Config(**SHAPES[shape], max_position_embeddings=4096, **ends)


def random_model(shape: str) -> PreTrainedModel:
    """In bfloat16, on the CPU: matrices out of one block of normal numbers, each from another place on; norms of 1."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    model.tie_weights()
    block = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for part in parameter.view(-1).split(BLOCK):
                begin = 7919 * i % BLOCK
                part.copy_(block[begin : begin + part.numel()])
    return model


@contextmanager
def model_folder(shape: str) -> Iterator[Path]:
    """A folder that ``from_pretrained`` loads: ``random_model``, and the tiny model's tokenizer. It lies in memory if
    there is room."""
    needed = 2.2 * sum(counts(shape).values())
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > needed
    folder = Path(tempfile.mkdtemp(prefix=f"qwen_{shape}_", dir=MEMORY if in_memory else None))
    try:
        random_model(shape).save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def make_policy(folder: Path, **sections: dict[str, Any]) -> tuple[Policy, Recipe]:
    """A policy that computes in bfloat16, on this launch's processes. ``sections`` go into its recipe."""
    fixed: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder), "dtype": "bfloat16"},
        "rollout": {"backend": "hf"},
        "training": {"output_dir": "unused", "prompts_per_step": 8},
    }
    for name, section in sections.items():
        fixed[name] = fixed.get(name, {}) | section
    recipe = Recipe.model_validate({"data": {"name": "countdown"}, "rewards": [{"name": "countdown"}], **fixed})
    tokenizer = load_tokenizer(recipe.model)
    return Policy(recipe, make_accelerator(recipe), tokenizer, [tokenizer.eos_token_id], False), recipe
