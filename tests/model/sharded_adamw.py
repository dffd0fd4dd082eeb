"""Two processes step shards by AdamW in little memory. Each prints "same" if whole weights step so too, to the bit.

The state then moves from two processes to one and back, as a checkpoint moves it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor

from grpo.config import OptimizerConfig
from grpo.model.optimizer import make_optimizer
from grpo.model.placing import cut_as

WHOLE = StateDictOptions(full_state_dict=True)
FORMS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"optim": "adamw_8bit"}),
    (torch.float32, {"offload": True}),
    (torch.bfloat16, {"optim": "adamw_8bit", "offload": True}),
    (torch.bfloat16, {}),
]


def model(dtype: torch.dtype) -> torch.nn.Module:
    """One of its weights has an odd number of rows, and rows that are no blocks of 8-bit moments. One has a single row,
    so that a process has none of it."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 301), torch.nn.Linear(301, 64), torch.nn.Linear(4096, 1)).to(dtype)


def step(trained: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def same(shards: torch.nn.Module, whole: torch.nn.Module) -> None:
    for (name, ours), expected in zip(shards.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), expected), name


def check(dtype: torch.dtype, keys: dict[str, Any]) -> None:
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, **keys)
    whole, shards = model(dtype), model(dtype)
    fully_shard(shards)
    by_whole, by_shards = make_optimizer(whole, config), make_optimizer(shards, config, sharded=True)
    for seed in range(3):
        step(whole, by_whole, seed)
        step(shards, by_shards, seed)
    same(shards, whole)
    gathered = get_optimizer_state_dict(shards, by_shards, options=WHOLE)
    alone = get_optimizer_state_dict(whole, by_whole, options=WHOLE)
    by_other = make_optimizer(whole, config)  # goes on from the state of two processes
    set_optimizer_state_dict(whole, by_other, {**gathered, "state": dict(gathered["state"])}, options=WHOLE)
    by_others = make_optimizer(shards, config, sharded=True)  # go on from the state of one
    set_optimizer_state_dict(shards, by_others, alone, options=WHOLE)
    step(whole, by_other, 3)
    step(shards, by_others, 3)
    same(shards, whole)


def parts_stay_where_they_are() -> None:
    """The host's part of a state, beside weights on GPUs: from there and back, it would not be page-locked any more."""
    gpus = DeviceMesh("cuda", torch.arange(2), _init_backend=False)
    weight = DTensor.from_local(torch.empty(3, 8, device="meta"), gpus, [Shard(0)], run_check=False)
    part = torch.zeros(3, 16)
    state = cut_as(weight, part)
    assert state.to_local().data_ptr() == part.data_ptr()
    assert (state.shape, state.device_mesh, state.placements) == ((6, 16), gpus, weight.placements)


def run(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    parts_stay_where_they_are()
    for dtype, keys in FORMS:
        check(dtype, keys)
    os.write(1, b"same\n")  # at once: two processes share it
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")  # torch is imported once for both
    processes = [context.Process(target=run, args=(rank, sys.argv[1])) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
