"""An update at a size: seconds, peak memory, and the model's share of the machine's matrix peak (MFU).

    python -m benchmarks.gpu.update 0.5b [--device cpu]

Counts the operations that forward and backward pass need (``shapes.training_flops``), not the ones repeated to save
memory. ``mfu`` counts each prompt once; ``mfu_prompts_repeated`` counts it for each completion, as trainers that pad
do. Completions' lengths are evenly spread up to the longest, and every one has an advantage. The time includes the
optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import median
from benchmarks.gpu.machine import matrix_peak, synchronize
from benchmarks.gpu.shapes import model_folder, training_flops
from benchmarks.rollout import make_policy
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step

# For each shape: whether activations are computed again in the backward pass, and micro_batch_tokens. All fit 80 GB.
VARIANTS = {
    "tiny": [(False, 64), (True, 64)],
    "0.5b": [(False, 16384), (False, 8192), (True, 32768)],
    "1.5b": [(False, 8192), (False, 4096), (True, 16384)],
    "3b": [(False, 2048), (True, 8192), (True, 16384)],
}


def make_sequences(options: argparse.Namespace) -> list[list[TrainedSequence]]:
    """Sequences by prompt. Lengths are spread within each group."""
    draw = random.Random(0)
    groups = []
    for _ in range(options.prompts):
        prompt = [draw.randrange(10, 300) for _ in range(options.prompt_length)]
        lengths = [max(1, round(options.length * (g + 1) / options.completions)) for g in range(options.completions)]
        completions = [[draw.randrange(10, 300) for _ in range(n)] for n in lengths]
        groups.append(
            [TrainedSequence(prompt, ids, [-5.0] * len(ids), (-1.0) ** g) for g, ids in enumerate(completions)]
        )
    return groups


def seconds_of_update(
    policy: Policy, recipe: Any, sequences: list[TrainedSequence], options: argparse.Namespace
) -> float:
    taken = []
    recipe.rollout.max_completion_length = options.length
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, policy, Path(folder))
        for _ in range(options.rounds + 1):
            synchronize(policy.device.type)
            begun = time.perf_counter()
            optimizer_step(run, sequences, 1e-6)
            synchronize(policy.device.type)
            taken.append(time.perf_counter() - begun)
    return median(taken[1:])  # the first is to warm up


def measure(policy: Policy, recipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest of the shape's variants, and all of them."""
    groups = make_sequences(options)
    sequences, peak = [s for group in groups for s in group], matrix_peak(policy.device.type)
    lengths = [[len(s.completion_ids) for s in group] for group in groups]
    once, each = training_flops(options.shape, [options.prompt_length] * options.prompts, lengths)
    variants: dict[str, dict[str, Any]] = {}
    for checkpointing, tokens in VARIANTS[options.shape]:
        on_gpu = policy.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _set_checkpointing(policy, checkpointing)
        recipe.training.micro_batch_tokens = tokens
        name = f"{tokens} tokens" + (", checkpointing" if checkpointing else "")
        try:
            seconds = seconds_of_update(policy, recipe, sequences, options)
            peak_gb = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
            variants[name] = {"update_s": seconds, "mfu": once / seconds / peak, "peak_gb": peak_gb}
        except torch.OutOfMemoryError:
            policy.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            variants[name] = {"error": "out of memory"}
    ran = {name: row for name, row in variants.items() if "error" not in row}
    best = min(ran, key=lambda name: ran[name]["update_s"])
    seconds = ran[best]["update_s"]
    return {
        "best": best,
        **ran[best],
        "mfu_prompts_repeated": each / seconds / peak,
        "samples_per_s": len(sequences) / seconds,
        "completion_tokens_per_s": sum(map(sum, lengths)) / seconds,
        "flops_per_s": peak,
        "variants": variants,
    }


def _set_checkpointing(policy: Policy, on: bool) -> None:
    if on:
        policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        policy.causal_lm.gradient_checkpointing_disable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with model_folder(options.shape, options.device) as folder:
        policy, recipe = make_policy(str(folder), "bfloat16")
        print(json.dumps({**measure(policy, recipe, options), "settings": vars(options)}))


if __name__ == "__main__":
    main()
