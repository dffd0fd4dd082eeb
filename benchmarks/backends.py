"""The rollout backends side by side: tokens/s, seconds of a sync, memory, and how far sampler and trainer differ.

    python -m benchmarks.backends [--model models/smollm2-135m] [--vllm-python .venv-vllm/bin/python]

hf, a colocated vLLM engine and a vLLM server generate the same prompts in turn, round after round, from the same
policy; medians are compared. Each sync hands over all weights and, for vLLM, checks them. Memory is the rollout's own,
without the trainer's: the proportional set size (PSS) of an engine's processes, its cache included, or the hf backend's
copy of the weights. Then, for each compute type, the trainer computes every sampled token's log-probability as the
update does. Reported are the differences, their importance ratios, and how weighting by these changes the gradient.
``--stale`` first trains the policy on the samples, by one step of that learning rate, as overlap does. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from grpo.backends import make_backend
from grpo.backends.base import Backend, Request, Sampling
from grpo.config import AlgorithmConfig, Recipe
from grpo.losses import Counts, importance_weights, policy_loss
from grpo.model.loading import load_tokenizer
from grpo.model.policy import Policy
from grpo.prompts.task import load_task
from grpo.randomness import key
from grpo.types import Completion, Prompt, TrainedSequence

ROOT = Path(__file__).parents[1]
CACHE = 1_000_000_000  # bytes of keys and values of an engine


def recipe_for(options: argparse.Namespace, dtype: str, **rollout: Any) -> Recipe:
    tiny = options.model == "data/tiny_base"
    data = {"name": "countdown", "max_prompt_length": 160, "template": "none" if tiny else "chat"}
    if tiny:
        data["args"] = {"question": "compact", "max_numbers": 3, "max_number": 9, "max_target": 60}
    return Recipe.model_validate(
        {
            "model": {"name": options.model, "dtype": dtype},
            "data": data,
            "rewards": [{"name": "countdown"}],
            "rollout": {"max_completion_length": options.length, **rollout},
            "training": {"output_dir": "unused"},
        }
    )


def make_policy(recipe: Recipe) -> Policy:
    AcceleratorState._reset_state(reset_partial_state=True)  # one process makes several
    accelerator = Accelerator(cpu=True)
    tokenizer = load_tokenizer(recipe.model)
    return Policy(recipe, accelerator, tokenizer, [tokenizer.eos_token_id], needs_reference=False)


def first_prompts(recipe: Recipe, policy: Policy, number: int) -> list[Prompt]:
    task = load_task(recipe, policy.tokenizer)
    return task.train_prompts(0)[:number]


class Server:
    """`launch/vllm_serve.sh`, as a user starts it."""

    def __init__(self, options: argparse.Namespace, dtype: str, folder: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = [f"--port={port}", f"--dtype={dtype}", f"--max-model-len={160 + options.length}", "--enforce-eager"]
        environment = os.environ | {
            "VLLM_PYTHON": str(Path(options.vllm_python).absolute()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        self.process = subprocess.Popen(
            [str(ROOT / "launch/vllm_serve.sh"), options.model, *arguments, f"--kv-cache-memory-bytes={CACHE}"],
            env=environment,
            stdout=(folder / "server.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while True:
            try:
                urllib.request.urlopen(self.url + "/health", timeout=2)
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit((folder / "server.log").read_text()[-2000:]) from None
                time.sleep(0.5)

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def memory_mb(pid: int) -> float:
    """Proportional set size of a process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    total, todo = 0.0, [pid]
    while todo:
        process = todo.pop()
        todo += children.get(process, [])
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        total += int(rollup.partition("Pss:")[2].split()[0]) / 1024
    return total


def speed(options: argparse.Namespace, dtype: str, folder: Path) -> dict[str, dict[str, float]]:
    server = Server(options, dtype, folder)
    arguments = [f"--kv-cache-memory-bytes={CACHE}"]
    python = str(Path(options.vllm_python).absolute())
    ways: dict[str, dict[str, Any]] = {
        "hf": {},
        "vllm colocated": {"backend": "vllm", "vllm_python": python, "vllm_args": arguments},
        "vllm server": {"backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url},
    }
    backends: dict[str, tuple[Backend, Policy]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, rollout in ways.items():
        recipe = recipe_for(options, dtype, **rollout)
        policy = make_policy(recipe)
        backends[name] = (make_backend(recipe, policy), policy)
        backends[name][0].sync(policy, 0)
        found[name] = {"tokens_per_s": [], "sync_s": []}
    prompts = first_prompts(recipe_for(options, dtype), policy, options.prompts)
    for round_ in range(options.rounds + 1):
        for name, (backend, policy) in backends.items():
            requests = [Request(p, [key(round_, p.id, g) for g in range(options.completions)]) for p in prompts]
            start = time.perf_counter()
            completions = backend.generate(requests, Sampling(options.length), round_)
            seconds = time.perf_counter() - start
            start = time.perf_counter()
            backend.sync(policy, round_ + 1)
            if round_ == 0:
                continue  # the first round warms up caches and threads
            found[name]["sync_s"].append(time.perf_counter() - start)
            found[name]["tokens_per_s"].append(sum(len(c.token_ids) for g in completions for c in g) / seconds)
    medians = {name: {what: statistics.median(values) for what, values in row.items()} for name, row in found.items()}
    medians["vllm server"]["engine_mb"] = memory_mb(server.process.pid)
    medians["vllm colocated"]["engine_mb"] = memory_mb(backends["vllm colocated"][0].keeper.engine.process.pid)  # type: ignore[attr-defined]
    medians["hf"]["engine_mb"] = weights_mb(backends["hf"][0])
    for backend, _ in backends.values():
        backend.close()
    server.close()
    return medians


def weights_mb(backend: Any) -> float:
    """MB of the hf backend's own copy of the weights in a rollout; 0 if it needs none."""
    if backend.shares_weights:
        return 0.0
    return sum(p.nbytes for p in backend.model.parameters()) / 2**20


def mismatch(options: argparse.Namespace, dtype: str, backend_name: str) -> dict[str, float]:
    """Differences between the sampler's and the trainer's log-probabilities, and the effect of importance weights."""
    python = str(Path(options.vllm_python).absolute())
    vllm = {"backend": "vllm", "vllm_python": python, "vllm_args": [f"--kv-cache-memory-bytes={CACHE}"]}
    recipe = recipe_for(options, dtype, **(vllm if backend_name == "vllm" else {}))
    policy = make_policy(recipe)
    backend = make_backend(recipe, policy)
    backend.sync(policy, 0)
    prompts = first_prompts(recipe, policy, options.prompts)
    requests = [Request(p, [key(7, p.id, g) for g in range(options.completions)]) for p in prompts]
    groups = backend.generate(requests, Sampling(options.length), 0)
    backend.close()
    if options.stale:
        take_a_step(policy, sequences_of(requests, groups), options.stale)
    return compare(policy, sequences_of(requests, groups))


def sequences_of(requests: list[Request], groups: list[list[Completion]]) -> list[TrainedSequence]:
    """The completions with advantages of +1 and -1 in turn: samplers are compared, not rewards."""
    return [
        TrainedSequence(r.prompt.token_ids, c.token_ids, c.sampler_logprobs, advantage=(-1.0) ** i)
        for r, group in zip(requests, groups, strict=True)
        for i, c in enumerate(group)
    ]


def take_a_step(policy: Policy, sequences: list[TrainedSequence], rate: float) -> None:
    gradient(policy, sequences, "none")
    policy.clip_gradients()
    policy.step(rate)


def gradient(policy: Policy, sequences: list[TrainedSequence], mode: str) -> torch.Tensor:
    """The policy gradient of all sequences under ``mode``, flat. It is left in ``grad`` too."""
    policy.model.zero_grad(set_to_none=True)
    tokens = sum(len(s.completion_ids) for s in sequences)
    counts = Counts(tokens=tokens, sequences=len(sequences), micro_batches=1, max_completion_length=0)
    for start in range(0, len(sequences), 8):
        batch = policy.collate(sequences[start : start + 8])
        logps_BT = policy.logprobs(batch, 1.0)[0]
        weights_BT = None
        if mode != "none":
            weights_BT = importance_weights(
                logps_BT.detach(), batch.sampler_logps_BT, batch.mask_BT, mode=mode, clip_min=None, clip_max=3.0
            )
        loss, _ = policy_loss(logps_BT, batch, counts, AlgorithmConfig(), weights_BT)
        loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]).clone()


def compare(policy: Policy, sequences: list[TrainedSequence]) -> dict[str, float]:
    log_ratios, sums = [], []
    with torch.no_grad():
        for s in sequences:
            batch = policy.collate([s])
            ours = policy.logprobs(batch, 1.0)[0][0, : len(s.completion_ids)].numpy()
            log_ratios.append(ours - np.array(s.sampler_logprobs))
            sums.append(log_ratios[-1].sum())
    every = np.concatenate(log_ratios)
    token, sequence = np.exp(every), np.exp(np.array(sums))
    plain = gradient(policy, sequences, "none")
    found = {
        "tokens": float(len(every)),
        "difference_mean": float(np.abs(every).mean()),
        "difference_p99": float(np.quantile(np.abs(every), 0.99)),
        "difference_max": float(np.abs(every).max()),
        "token_ratio_min": float(token.min()),
        "token_ratio_max": float(token.max()),
        "tokens_over_3": float((token > 3).mean()),
        "sequence_ratio_min": float(sequence.min()),
        "sequence_ratio_max": float(sequence.max()),
        "sequences_over_3": float((sequence > 3).mean()),
    }
    for mode in ("token_truncate", "sequence_mask"):
        corrected = gradient(policy, sequences, mode)
        found[f"gradient_moved_by_{mode}"] = float((corrected - plain).norm() / plain.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stale", type=float, default=0.0, metavar="LEARNING_RATE")
    parser.add_argument("--only", choices=["speed", "mismatch"])
    options = parser.parse_args()
    result: dict[str, Any] = {"model": options.model, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in options.dtypes:
            if options.only != "mismatch":
                result[f"speed {dtype}"] = rows = speed(options, dtype, Path(folder))
                print_table(f"{options.model}, {dtype}, {options.prompts} x {options.completions}", rows)
            if options.only != "speed":
                rows = {name: mismatch(options, dtype, name) for name in ("hf", "vllm")}
                result[f"mismatch {dtype}"] = rows
                print_table(f"sampler against trainer, {dtype}", rows)
    print(json.dumps(result))


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title}")
    columns = list(next(iter(rows.values())))
    width = max(map(len, columns))
    print(" " * width, *(f"{name:>16}" for name in rows))
    for column in columns:
        print(f"{column:<{width}}", *(f"{row[column]:>16.4g}" for row in rows.values()))


if __name__ == "__main__":
    main()
