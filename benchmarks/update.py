"""An update: padded rows beside packed ones, in seconds, tokens a second, memory, and share of the matrix peak.

    python -m benchmarks.update [--model models/smollm2-135m] [--dtype float32]

The work is one step's: prompts of about 100 tokens with 8 completions each, of 64 to 128 tokens, every one with an
advantage; forward, backward, clipping and the optimizer's step. Ways take turns and medians are compared. ``mfu``
divides the operations a second that the update needs (each prompt once, nothing twice) by those of a large product in
the same type, measured in the same run. Peak memory is measured in a process of its own, less its memory before the
update.

    --sizes 512 1024 2048     the packed way by ``training.micro_batch_tokens``
    --lengths 64 128 256      by completion length: seconds against tokens
    --vocabularies 8 16 32    peak memory of the head alone by vocabulary (thousands) and, with --lengths, tokens
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import hardware, median, peak_memory_mb, print_table, turn, versions
from benchmarks.models import make_policy
from grpo.config import Recipe
from grpo.kernels import grads_in_place, prepare_process
from grpo.model.logprobs import token_statistics
from grpo.model.policy import Policy
from grpo.packing import packed_tokens
from grpo.run.run import Run
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step


def make_sequences(vocab_size: int, prompts: int, completions: int, length: int) -> list[TrainedSequence]:
    """Made-up tokens. Completions are half of ``length``, the longest, or more; two thirds of it in the mean."""
    draw = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(n)]

    made = []
    for _ in range(prompts):
        prompt = tokens(draw.randrange(90, 111))
        for _ in range(completions):
            n = min(length, round(length * (0.5 + draw.expovariate(6))))
            made.append(TrainedSequence(prompt, tokens(n), [-5.0] * n, draw.gauss(0, 1)))
    return made


def vocabulary(policy: Policy) -> int:
    return policy.causal_lm.config.get_text_config(decoder=True).vocab_size


def seconds_of_step(policy: Policy, recipe: Recipe, sequences: list[TrainedSequence], packed: bool, size: int) -> float:
    policy.packed = packed
    recipe.training.micro_batch_tokens = size
    recipe.rollout.max_completion_length = max(len(s.completion_ids) for s in sequences)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, policy, Path(folder))
        begun = time.perf_counter()
        optimizer_step(run, sequences, 1e-6)
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun


def operations(policy: Policy, sequences: list[TrainedSequence]) -> float:
    """Floating-point operations of the products with weights, forward and backward (6 a weight and token): each prompt
    once, the head at completions. Attention is left out (a few per cent at these lengths)."""
    head = policy.causal_lm.get_output_embeddings().weight.numel()
    embeddings = policy.causal_lm.get_input_embeddings().weight
    body = sum(p.numel() for p in policy.causal_lm.parameters()) - embeddings.numel()
    body -= 0 if policy.causal_lm.get_output_embeddings().weight is embeddings else head
    return 6.0 * (body * packed_tokens(sequences) + head * sum(len(s.completion_ids) for s in sequences))


def matrix_peak(policy: Policy) -> float:
    """Operations a second of products with an MLP's shapes, in the compute type."""
    a, b = (torch.randn(2048, 2048, device=policy.device).to(policy.compute_dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        a @ b
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048**3 / best


def compare(options: argparse.Namespace, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each way's median over the rounds, in turns. ``packed``, ``size`` and ``length`` define a way."""
    policy, recipe = make_policy(options.model, options.dtype)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    work = {
        name: make_sequences(vocabulary(policy), options.prompts, options.completions, way["length"])
        for name, way in ways.items()
    }
    peaks = []
    for round_ in range(options.rounds + 1):
        for name, way in ways.items():
            with turn(options.lock):
                peaks.append(matrix_peak(policy))
                found = seconds_of_step(policy, recipe, work[name], way["packed"], way["size"])
            if round_ or options.rounds == 1:
                taken[name].append(found)
    rows = {}
    for name, way in ways.items():
        tokens, seconds = sum(len(s.completion_ids) for s in work[name]), median(taken[name])
        rows[name] = {
            "seconds": seconds,
            "packed_tokens": packed_tokens(work[name]),
            "completion_tokens_per_s": tokens / seconds,
            "mfu": operations(policy, work[name]) / seconds / median(peaks),
            "peak_mb": _in_a_process("--peak-of", json.dumps(way), options) if options.memory else None,
        }
    rows[next(iter(rows))]["gflops_of_the_matrix_peak"] = median(peaks) / 1e9
    return rows


def peak_of(options: argparse.Namespace) -> float:
    """MB that one update adds to the peak of a fresh process. This includes gradients and moments, as any way needs."""
    way = json.loads(options.peak_of)
    policy, recipe = make_policy(options.model, options.dtype)
    sequences = make_sequences(vocabulary(policy), options.prompts, options.completions, way["length"])
    before = _resident_mb()
    seconds_of_step(policy, recipe, sequences, way["packed"], way["size"])
    return peak_memory_mb() - before


def peak_of_head(options: argparse.Namespace) -> float:
    """MB that log-probabilities and their gradient add in a run, without the gradient of the head's weight."""
    V, N = json.loads(options.peak_of_head)
    prepare_process()
    head, hidden_NH = torch.nn.Linear(256, V, bias=False), torch.randn(N, 256, requires_grad=True)
    grads_in_place.install(head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    targets_N = torch.zeros(N, dtype=torch.long)
    logps_N, *_ = token_statistics(hidden_NH, targets_N, head, vocab_size=V, parameters=head.parameters())
    logps_N.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before - V * 256 * 4 / 2**20


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _in_a_process(flag: str, value: str, options: argparse.Namespace) -> float:
    size = ["--prompts", str(options.prompts), "--completions", str(options.completions)]
    command = [sys.executable, "-m", "benchmarks.update", flag, value, "--model", options.model]
    with turn(options.lock):
        done = subprocess.run([*command, "--dtype", options.dtype, *size], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="longest completion")
    parser.add_argument("--size", type=int, default=2048, help="micro_batch_tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--vocabularies", type=int, nargs="+")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--lock", help="a file, locked while measuring")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--peak-of-head", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.peak_of:
        return print(peak_of(options))
    if options.peak_of_head:
        return print(peak_of_head(options))
    plain = {"packed": True, "size": options.size, "length": options.length}
    if options.vocabularies:
        title = "peak MB of the head, by vocabulary (thousands) and tokens"
        rows: dict[str, dict[str, Any]] = {
            f"{V}k": {
                str(N): _in_a_process("--peak-of-head", json.dumps([V * 1000, N]), options)
                for N in options.lengths or [1000, 4000, 16000]
            }
            for V in options.vocabularies
        }
    elif options.lengths:
        title = "seconds by longest completion"
        rows = compare(options, {str(length): plain | {"length": length} for length in options.lengths})
    elif options.sizes:
        title = "packed, by micro_batch_tokens"
        rows = compare(options, {str(size): plain | {"size": size} for size in options.sizes})
    else:
        title = "one optimizer step"
        rows = compare(options, {"padded": plain | {"packed": False}, "packed": plain})
        rows["packed"]["speedup"] = rows["padded"]["seconds"] / rows["packed"]["seconds"]
    print_table(title, rows)
    print(json.dumps({"rows": rows, "hardware": hardware(), "versions": versions(), "options": vars(options)}))
    return None


if __name__ == "__main__":
    main()
