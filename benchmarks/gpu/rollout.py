"""The hf backend's rollout at a size: tokens a second, and the time of a decoding step against the bandwidth floor.

    python -m benchmarks.gpu.rollout 0.5b [--device cpu]

Lengths of completions are forced, because random weights do not end: all the longest, or evenly spread. A decoding
step's time is the difference between two rollouts that differ in length alone, per token. The floor is the time to read
the weights once at the machine's measured bandwidth; a second figure adds each completion's keys and values.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch

from benchmarks.common import median
from benchmarks.gpu.machine import bandwidth, synchronize
from benchmarks.gpu.shapes import cache_bytes_per_token, counts, model_folder
from benchmarks.rollout import make_backend
from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend, make_plain_step
from grpo.randomness import key
from grpo.types import Prompt


def force_lengths(wanted: dict[int, int]) -> None:
    def ended(self: Any, key: int, token_ids: list[int], stop: Any) -> bool:
        return len(token_ids) >= wanted[key]

    HFBackend._ended = ended  # type: ignore[method-assign]


def make_requests(options: argparse.Namespace) -> list[Request]:
    draw = random.Random(0)
    prompts = [[draw.randrange(10, 300) for _ in range(options.prompt_length)] for _ in range(options.prompts)]
    return [
        Request(Prompt(i, "", "", ids), [key(i, g) for g in range(options.completions)])
        for i, ids in enumerate(prompts)
    ]


def seconds(backend: HFBackend, requests: list[Request], lengths: list[int], wanted: dict[int, int]) -> float:
    wanted.update(zip((k for r in requests for k in r.keys), lengths, strict=True))
    synchronize(backend.device.type)
    begun = time.perf_counter()
    groups = backend.generate(requests, Sampling(max(lengths)), 0)
    synchronize(backend.device.type)
    assert [len(c.token_ids) for group in groups for c in group] == lengths
    return time.perf_counter() - begun


def measure(backend: HFBackend, options: argparse.Namespace) -> dict[str, Any]:
    requests, wanted = make_requests(options), {}
    force_lengths(wanted)
    B, T = options.prompts * options.completions, options.length
    spread = [max(1, round(T * (i + 1) / B)) for i in range(B)]
    random.Random(1).shuffle(spread)
    seconds(backend, requests, [min(T, 16)] * B, wanted)  # to warm up
    cases = {"longest": [T] * B, "half": [max(1, T // 2)] * B, "spread": spread}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, lengths in cases.items():
            taken[name].append(seconds(backend, requests, lengths, wanted))
    medians = {name: median(values) for name, values in taken.items()}
    step = (medians["longest"] - medians["half"]) / (T - max(1, T // 2))
    weights = 2 * sum(counts(options.shape).values())
    cache = cache_bytes_per_token(options.shape) * B * (options.prompt_length + 0.75 * T)
    rate = bandwidth(backend.device.type)
    return {
        "tokens_per_s": B * T / medians["longest"],
        "tokens_per_s_spread": sum(spread) / medians["spread"],
        "decode_step_s": step,
        "floor_s": weights / rate,
        "step_over_floor": step * rate / weights,
        "step_over_floor_with_cache": step * rate / (weights + cache),
        "bytes_per_s": rate,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if backend.device.type == "cuda" else None,
    }


def plain_step_seconds(backend: HFBackend, options: argparse.Namespace) -> float:
    """A decoding step through transformers, a kernel at a time, to compare with one graph a step."""
    requests, wanted = make_requests(options), {}
    force_lengths(wanted)
    B, T = options.prompts * options.completions, min(64, options.length)
    backend.make_step = make_plain_step
    short, long = (seconds(backend, requests, [n] * B, wanted) for n in (max(1, T // 2), T))
    return (long - short) / (T - max(1, T // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with model_folder(options.shape, options.device) as folder:
        backend, _ = make_backend(str(folder), "bfloat16")
        result = measure(backend, options) | {"plain_decode_step_s": plain_step_seconds(backend, options)}
        print(json.dumps(result | {"settings": vars(options)}))


if __name__ == "__main__":
    main()
