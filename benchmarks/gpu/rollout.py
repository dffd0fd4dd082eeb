"""The hf backend's rollout at a size, against what reading the weights and multiplying by them takes at the least.

    python -m benchmarks.gpu.rollout 0.5b [--device cpu]

- Decoding: two rollouts that differ in their completions' length alone; their difference over the tokens between is a
  step. Its floor is the time to read the weights once at the machine's measured bandwidth; a second floor adds each
  completion's keys and values.
- Prefill: long prompts with one token each, against the matrix peak.
- A whole rollout, with all completions at the longest length, and with lengths evenly spread.

Random weights seldom end, and their lengths are forced here. A line of JSON is printed after each measurement.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.common import log_to_stderr
from benchmarks.gpu.machine import bandwidth, matrix_peak, synchronize
from benchmarks.gpu.models import make_policy, model_folder
from benchmarks.gpu.shapes import cache_bytes_per_token, counts
from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend, make_graph_step, make_plain_step
from grpo.randomness import key
from grpo.types import Prompt

PREFILL = {"cuda": (64, 512), "cpu": (2, 16)}  # prompts, and tokens of each
OTHERS_LENGTH = 64


@contextmanager
def forced_lengths() -> Iterator[dict[int, int]]:
    """Within it, a completion ends at the length that the dictionary has for its key."""
    wanted: dict[int, int] = {}
    ended = HFBackend._ended
    HFBackend._ended = lambda self, key, token_ids, stop: len(token_ids) >= wanted[key]  # type: ignore[method-assign]
    try:
        yield wanted
    finally:
        HFBackend._ended = ended  # type: ignore[method-assign]


def make_requests(prompts: int, completions: int, prompt_length: int) -> list[Request]:
    draw = random.Random(0)
    ids = [[draw.randrange(10, 300) for _ in range(prompt_length)] for _ in range(prompts)]
    return [Request(Prompt(i, "", "", ids[i]), [key(i, g) for g in range(completions)]) for i in range(prompts)]


def seconds(backend: HFBackend, requests: list[Request], lengths: list[int], wanted: dict[int, int]) -> float:
    """Of one rollout whose completions have these lengths."""
    wanted.update(zip((k for r in requests for k in r.keys), lengths, strict=True))
    synchronize(backend.device.type)
    begun = time.perf_counter()
    groups = backend.generate(requests, Sampling(max(lengths)), 0)
    synchronize(backend.device.type)
    assert [len(c.token_ids) for group in groups for c in group] == lengths
    return time.perf_counter() - begun


def step_seconds(
    backend: HFBackend, requests: list[Request], wanted: dict[int, int], T: int, rounds: int
) -> tuple[float, float]:
    """Of a decoding step, and of the rollout of ``T`` tokens; the shortest of ``rounds`` after one to warm up."""
    B, half = sum(len(request.keys) for request in requests), max(1, T // 2)
    taken = [[seconds(backend, requests, [n] * B, wanted) for n in (half, T)] for _ in range(rounds + 1)][-rounds:]
    short, long = (min(times) for times in zip(*taken, strict=True))
    return (long - short) / (T - half), long


def decoding(backend: HFBackend, options: argparse.Namespace, wanted: dict[int, int], rate: float) -> dict[str, Any]:
    requests = make_requests(options.prompts, options.completions, options.prompt_length)
    B, T = options.prompts * options.completions, options.length
    step, long = step_seconds(backend, requests, wanted, T, options.rounds)
    weights = 2 * sum(counts(options.shape).values())
    cache = cache_bytes_per_token(options.shape) * B * (options.prompt_length + 0.75 * T)
    return {
        "sequences": B,
        "decode_step_ms": 1e3 * step,
        "decode_tokens_per_s": B / step,
        "floor_ms": 1e3 * weights / rate,
        "floor_with_cache_ms": 1e3 * (weights + cache) / rate,
        "step_over_floor": step * rate / weights,
        "step_over_floor_with_cache": step * rate / (weights + cache),
        "rollout_tokens_per_s": B * T / long,
    }


def decoding_few(
    backend: HFBackend, options: argparse.Namespace, wanted: dict[int, int], rate: float
) -> dict[str, Any]:
    """A step of the completions of one prompt alone, where the weights' floor counts most."""
    requests = make_requests(1, options.completions, options.prompt_length)
    step, _ = step_seconds(backend, requests, wanted, min(128, options.length), 1)
    weights = 2 * sum(counts(options.shape).values())
    return {"small_decode_step_ms": 1e3 * step, "small_step_over_floor": step * rate / weights}


def prefill(backend: HFBackend, options: argparse.Namespace, wanted: dict[int, int]) -> dict[str, Any]:
    prompts, tokens = PREFILL[backend.device.type]
    requests = make_requests(prompts, 1, tokens)
    taken = min(seconds(backend, requests, [1] * prompts, wanted) for _ in range(3))
    flops = 2.0 * counts(options.shape)["layers"] * prompts * tokens
    return {
        "prefill_tokens_per_s": prompts * tokens / taken,
        "prefill_mfu": flops / taken / matrix_peak(backend.device.type),
    }


def spread(backend: HFBackend, options: argparse.Namespace, wanted: dict[int, int]) -> dict[str, Any]:
    requests = make_requests(options.prompts, options.completions, options.prompt_length)
    B, T = options.prompts * options.completions, options.length
    lengths = [max(1, round(T * (i + 1) / B)) for i in range(B)]
    random.Random(1).shuffle(lengths)
    return {"rollout_tokens_per_s_spread": sum(lengths) / seconds(backend, requests, lengths, wanted)}


def other_steps(backend: HFBackend, options: argparse.Namespace, wanted: dict[int, int]) -> dict[str, Any]:
    """Decoding steps in the ways that the backend did not choose: through transformers, a kernel at a time; and on a
    GPU one graph with attention under masks."""
    requests = make_requests(options.prompts, options.completions, options.prompt_length)
    B, T = options.prompts * options.completions, min(OTHERS_LENGTH, options.length)
    ways = {"plain": make_plain_step} | ({"masked": make_graph_step} if backend.device.type == "cuda" else {})
    found = {}
    for name, make_step in ways.items():
        backend.make_step, backend.kept = make_step, None
        short, long = (seconds(backend, requests, [n] * B, wanted) for n in (max(1, T // 2), T))
        found[f"{name}_decode_step_ms"] = 1e3 * (long - short) / (T - max(1, T // 2))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args(arguments)
    log_to_stderr()
    with model_folder(options.shape) as folder:
        begun = time.perf_counter()
        policy, recipe = make_policy(folder)
    backend = HFBackend(policy, max_batch_size=recipe.rollout.max_batch_size)
    backend.sync(policy, 0)

    def say(found: dict[str, Any]) -> None:
        print(json.dumps(found), flush=True)

    say({"settings": vars(options), "start_s": time.perf_counter() - begun})
    rate = bandwidth(backend.device.type)
    with forced_lengths() as wanted:
        say(decoding(backend, options, wanted, rate))
        say(prefill(backend, options, wanted))
        if backend.device.type == "cuda":
            say({"peak_gb": torch.cuda.max_memory_allocated() / 1e9})
        say(spread(backend, options, wanted))
        say(decoding_few(backend, options, wanted, rate))
        say(other_steps(backend, options, wanted))


if __name__ == "__main__":
    main()
