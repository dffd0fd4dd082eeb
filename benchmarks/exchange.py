"""A step's completions from every process to every process: flat arrays (``grpo.run.exchange``) beside pickled lists.

    python -m benchmarks.exchange [--completions 8192] [--tokens 1024] [--processes 2] [--rounds 3]

Starts the processes over gloo. Each makes its share of the completions and gets all of them, both ways in turn. The
last line is JSON: for each way the CPU seconds of the first process (median over the rounds), the bytes that it sends,
and the bytes of memory that a received token takes. Fails where the two ways do not give the same completions.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from benchmarks.common import ROOT, versions
from grpo.run.exchange import gather_groups, pack
from grpo.types import Completion, Group, Prompt, Status, VersionSpan

G = 16


def groups(of: range, tokens: int) -> dict[int, Group]:
    """Random groups with places; texts of four characters a token."""
    made = {}
    for place in of:
        rng = np.random.default_rng(place)
        completions = [
            Completion(
                rng.integers(0, 150_000, tokens).tolist(),
                np.log(rng.random(tokens, dtype=np.float32)).tolist(),
                Status.STOP,
                "word" * tokens,
                [VersionSpan(0, tokens, 3)],
            )
            for _ in range(G)
        ]
        prompt = Prompt(place, "question", "question", rng.integers(0, 150_000, 128).tolist())
        made[place] = Group(prompt, completions, [1.0] * G, {"f": [1.0] * G})
    return made


def bytes_of(completion: Completion) -> int:
    """What its token ids and log-probabilities take: an array its numbers, a list also an object for each."""
    parts = (completion.token_ids, completion.sampler_logprobs)
    return sum(sys.getsizeof(p) + (sum(map(sys.getsizeof, p)) if isinstance(p, list) else 0) for p in parts)


def measure(options: argparse.Namespace) -> None:
    """What each of the processes does; the first one prints."""
    state = PartialState(cpu=True)
    size = options.completions // G // state.num_processes
    mine = groups(range(size * state.process_index, size * (state.process_index + 1)), options.tokens)
    ways = {"lists": lambda: gather_object(list(mine.values())), "arrays": lambda: gather_groups(mine)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    held: dict[str, list[Any]] = {}
    memory: dict[str, float] = {}
    for _ in range(options.rounds):
        for way, gather in ways.items():
            start = time.process_time()
            found = gather()
            seconds[way].append(time.process_time() - start)
            memory[way] = bytes_of(found[-1].completions[-1]) / options.tokens
            held[way] = [(list(c.token_ids), list(c.sampler_logprobs)) for group in found for c in group.completions]
            del found
        if held["lists"] != held["arrays"]:
            sys.exit("the two ways differ")
    completions = [c for group in mine.values() for c in group.completions]
    sent = {"lists": len(pickle.dumps(list(mine.values()))), "arrays": len(pickle.dumps(pack(completions)))}
    if state.is_main_process:
        found = {
            way: {
                "cpu_seconds": statistics.median(seconds[way]),
                "bytes": sent[way],
                "memory_bytes_per_token": round(memory[way], 1),
            }
            for way in ways
        }
        print(json.dumps({"completions": options.completions, "tokens": options.tokens, **found, **versions()}))
    state.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exchange", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--completions", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options)
        return
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    command = [sys.executable, "-m", *launcher, "-m", "benchmarks.exchange", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)


if __name__ == "__main__":
    main()
