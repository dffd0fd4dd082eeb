"""Seconds of a step on GPUs, from data sheets and assumed shares of them. Nothing was measured on a GPU."""

from __future__ import annotations

import math

from grpo.config import Recipe
from grpo.model.shape import Shape
from grpo.plan.cards import Card
from grpo.plan.work import Lengths, Work

KERNEL = 1.8e-6  # seconds of a node of a CUDA graph that does nothing else
KERNELS_OF_LAYER, KERNELS_OF_STEP = 76, 80  # of a decoding step, counted on the meta device
VLLM_SHARE = 0.5  # of the memory's bandwidth, while it decodes
HF_CACHE_READS = 3.0  # times what is needed: rows are read to the length of the longest of a few
OTHER = 0.1  # share of a step that is neither rollout nor update: weights to the engine, rewards, logs


def shares_of_peak(shape: Shape) -> float:
    """Model FLOPs utilization of an update: 0.18 at a width of 896 (0.5B), 0.30 at 2048 (3B)."""
    share = 0.18 + 0.12 * math.log(shape.hidden / 896) / math.log(2048 / 896)
    return min(max(share, 0.05), 0.40)


def update_seconds(shape: Shape, work: Work, card: Card, gpus: int) -> float:
    return work.update_flops / (card.flops * shares_of_peak(shape) * gpus)


def rollout_seconds(recipe: Recipe, shape: Shape, lengths: Lengths, work: Work, card: Card, gpus: int) -> float:
    """Decoding reads all weights for every token of its longest sequence, and each token's keys and values."""
    rows = math.ceil(work.completions / gpus)
    at_once = min(rows, recipe.rollout.max_batch_size) if recipe.rollout.backend == "hf" else rows
    steps = math.ceil(rows / at_once) * lengths.longest
    weights = 2.0 * shape.parameters
    of_token = shape.kv_token if recipe.rollout.backend == "hf" else shape.kv_token_of_vllm
    cache = work.completion_tokens / gpus * (lengths.prompt + (lengths.completion + lengths.environment) / 2) * of_token
    prefill = work.prefill_flops / gpus / (card.flops * shares_of_peak(shape))
    if recipe.rollout.backend == "hf":
        kernels = KERNEL * (shape.layers * KERNELS_OF_LAYER + KERNELS_OF_STEP)
        return prefill + steps * (kernels + weights / card.bandwidth) + HF_CACHE_READS * cache / card.bandwidth
    return prefill + (steps * weights + cache) / (card.bandwidth * VLLM_SHARE)


def assumptions(recipe: Recipe, shape: Shape, card: Card) -> list[str]:
    how = (
        f"{KERNELS_OF_LAYER} kernels a layer of {KERNEL * 1e6:.1f} µs, and the weights read once a token"
        if recipe.rollout.backend == "hf"
        else f"vLLM at {VLLM_SHARE:.0%} of the memory's bandwidth"
    )
    found = [
        f"an update at {shares_of_peak(shape):.0%} of {card.flops / 1e12:.0f} TFLOP/s",
        f"sampling: {how}; {OTHER:.0%} of a step for the rest",
        "no figure of a GPU was measured: data sheets, and counts made on a CPU",
    ]
    return found if recipe.stage == "grpo" else [found[0], found[2]]
