"""Rollout and update at a size under accelerate's FSDP2, as a launch of the trainer has it.

    accelerate launch --config_file launch/fsdp2.yaml --num_processes 1 -m benchmarks.gpu.fsdp 0.5b [--device cpu]

One process shards over itself: the weights are DTensors all the same, and casts, hooks and reductions are those of
many. ``logprob_difference`` is the mean distance of the update's log-probabilities from the sampler's, in
nats; in bfloat16 some hundredths are rounding, and more would be another computation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import log_to_stderr
from benchmarks.gpu.machine import synchronize
from benchmarks.gpu.models import make_policy, model_folder
from benchmarks.gpu.rollout import make_requests
from grpo.backends.base import Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.types import TrainedSequence
from grpo.update.step import optimizer_step

STEPS = 3


def sampled(policy: Policy, options: argparse.Namespace) -> list[TrainedSequence]:
    """Completions by the policy itself, with advantages of both signs."""
    backend = HFBackend(policy, max_batch_size=64)
    backend.sync(policy, 0)
    requests = make_requests(options.prompts, options.completions, options.prompt_length)
    groups = backend.generate(requests, Sampling(options.length), 0)
    backend.close()
    return [
        TrainedSequence(request.prompt.token_ids, c.token_ids, c.sampler_logprobs, (-1.0) ** g)
        for request, group in zip(requests, groups, strict=True)
        for g, c in enumerate(group)
    ]


@torch.no_grad()
def logprobs(policy: Policy, sequences: list[TrainedSequence]) -> tuple[str, float]:
    """The type of the update's log-probabilities, and their mean distance from the sampler's."""
    batch = policy.collate(sequences)
    logps_BT, _ = policy.logprobs(batch, 1.0)
    distance = (logps_BT - batch.sampler_logps_BT).abs()[batch.mask_BT.bool()].mean()
    return str(logps_BT.dtype).removeprefix("torch."), float(distance)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    options = parser.parse_args(arguments)
    log_to_stderr()
    with model_folder(options.shape) as folder:
        begun = time.perf_counter()
        policy, recipe = make_policy(folder)
    first = policy.accelerator.is_main_process

    def say(found: dict[str, Any]) -> None:
        if first:
            print(json.dumps(found), flush=True)

    processes = policy.accelerator.num_processes
    say({"settings": vars(options), "processes": processes, "sharded": policy.sharded, "packed": policy.packed})
    sequences = sampled(policy, options)
    dtype, distance = logprobs(policy, sequences)
    say({"start_s": time.perf_counter() - begun, "logprob_dtype": dtype, "logprob_difference": distance})
    recipe.training.micro_batch_tokens = 4096
    recipe.rollout.max_completion_length = options.length
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, policy, Path(folder))
        for _ in range(STEPS):
            synchronize(policy.device.type)
            begun = time.perf_counter()
            metrics = optimizer_step(run, sequences, 1e-6)
            synchronize(policy.device.type)
            found = {"step_s": time.perf_counter() - begun, "loss": metrics["loss"], "grad_norm": metrics["grad_norm"]}
    if policy.device.type == "cuda":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    say(found)
    if not policy.sharded or dtype != "float32":
        raise SystemExit(f"sharded: {policy.sharded}, log-probabilities in {dtype}")
    policy.accelerator.end_training()


if __name__ == "__main__":
    main()
