"""An update at a size in several ways: seconds, peak memory, and the model's share of the machine's matrix peak (MFU).

    python -m benchmarks.gpu.update 0.5b [--device cpu]

Counts the operations that forward and backward pass need (``shapes.training_flops``), not the ones repeated to save
memory. ``mfu`` counts each prompt once; ``mfu_prompts_repeated`` counts it for each completion, as trainers that pad
do. Completions' lengths are evenly spread up to the longest, and every one has an advantage. The time includes the
optimizer's step. A line of JSON is printed after each way.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import log_to_stderr
from benchmarks.gpu.machine import matrix_peak, synchronize
from benchmarks.gpu.models import make_policy, model_folder
from benchmarks.gpu.shapes import expected_update_gb, training_flops
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step

# A shape's micro_batch_tokens without checkpointing and with it. All fit 80 GB by ``shapes.expected_update_gb``.
TOKENS = {"tiny": (64, 64), "0.5b": (16384, 32768), "1.5b": (16384, 32768), "3b": (8192, 16384)}


@dataclass(frozen=True)
class Way:
    """How an update is made; ``kernels`` is ``model.kernels`` of the recipe."""

    tokens: int
    packed: bool = True
    checkpointing: bool = False
    kernels: str | tuple[str, ...] = "auto"


def ways_of(shape: str) -> dict[str, Way]:
    """The most telling first. Those of the same ``kernels`` stand together, because each needs a policy of its own."""
    lean, checkpointed = TOKENS[shape]
    ways = {
        "packed": Way(lean),
        "padded": Way(lean, packed=False),
        "packed, checkpointing": Way(checkpointed, checkpointing=True),
        "packed, half the tokens": Way(lean // 2),
    }
    if shape != "3b":  # whose weights take too long to be read again
        ways["packed, no kernels"] = Way(lean, kernels="none")
        ways["packed, a float32 head alone"] = Way(lean, kernels=("float32_head",))
    return ways


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


def seconds_of_update(policy: Policy, recipe: Any, sequences: list[TrainedSequence], rounds: int) -> float:
    """The shortest of ``rounds`` after one to warm up."""
    taken = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, policy, Path(folder))
        for _ in range(rounds + 1):
            synchronize(policy.device.type)
            begun = time.perf_counter()
            optimizer_step(run, sequences, 1e-6)
            synchronize(policy.device.type)
            taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def measure(policy: Policy, recipe: Any, way: Way, options: argparse.Namespace) -> dict[str, Any]:
    """One way's figures, or that memory ran out."""
    sequences = [s for group in make_sequences(options) for s in group]
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    _set_checkpointing(policy, way.checkpointing)
    recipe.training.micro_batch_tokens = way.tokens
    recipe.rollout.max_completion_length = options.length
    can_pack, policy.packed = policy.packed, policy.packed and way.packed
    if way.packed and not can_pack:
        return {"error": "this policy pads"}
    try:
        seconds = seconds_of_update(policy, recipe, sequences, options.rounds)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        policy.packed = can_pack
        policy.optimizer.zero_grad(set_to_none=True)
        gc.collect()
    return {
        "update_s": seconds,
        "samples_per_s": len(sequences) / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "expected_gb": expected_update_gb(options.shape, way.tokens, checkpointing=way.checkpointing),
    }


def _set_checkpointing(policy: Policy, on: bool) -> None:
    if on:
        policy.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        policy.causal_lm.gradient_checkpointing_disable()


def summary(ways: dict[str, dict[str, Any]], options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """The fastest way so far, its share of the peak, and how packed and padded rows compare."""
    ran = {name: row for name, row in ways.items() if "error" not in row}
    if not ran:
        return {"ways": ways}
    best = min(ran, key=lambda name: ran[name]["update_s"])
    lengths = [[len(s.completion_ids) for s in group] for group in make_sequences(options)]
    once, each = training_flops(options.shape, [options.prompt_length] * options.prompts, lengths)
    found = {
        "best": best,
        **ran[best],
        "mfu": once / ran[best]["update_s"] / peak,
        "mfu_prompts_repeated": each / ran[best]["update_s"] / peak,
        "flops_per_s": peak,
        "ways": ways,
    }
    if {"packed", "padded"} <= ran.keys():
        found["packed_over_padded"] = ran["padded"]["update_s"] / ran["packed"]["update_s"]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    log_to_stderr()
    found: dict[str, dict[str, Any]] = {}
    policy, recipe, of_kernels, peak = None, None, None, 0.0
    with model_folder(options.shape) as folder:
        for name, way in ways_of(options.shape).items():
            if policy is None or way.kernels != of_kernels:
                policy = None  # its memory is free before that of another is taken
                gc.collect()
                begun, of_kernels = time.perf_counter(), way.kernels
                kernels = way.kernels if isinstance(way.kernels, str) else list(way.kernels)
                policy, recipe = make_policy(folder, model={"kernels": kernels})
                if not found:
                    print(json.dumps({"settings": vars(options), "start_s": time.perf_counter() - begun}), flush=True)
                    peak = matrix_peak(policy.device.type)
            found[name] = measure(policy, recipe, way, options)
            print(json.dumps(summary(found, options, peak)), flush=True)


if __name__ == "__main__":
    main()
