"""The processes of a run, and what a stage needs before its folder is claimed: accelerate, tokenizer and data.

A stage calls these in the order that makes mistakes cheap: data and reward functions are checked before anything is
written, the folder is claimed before any weights load (``run.start_run``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from datetime import timedelta
from time import sleep
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
)

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.kernels import prepare_process
from grpo.model.devices import compute_dtype, has_bfloat16
from grpo.model.first_process import on_main as on_main
from grpo.model.loading import load_configs, load_tokenizer
from grpo.model.processes import mixed_precision_policy
from grpo.prompts.checks import check_before_loading, stop_token_ids
from grpo.prompts.task import Task, load_task
from grpo.run.nodes import check_same_on_all, choose_interface, watch_peers

log = logging.getLogger("grpo")


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate as ``accelerate launch`` configured it; accumulation stays at 1 (``update/step.py`` does its own)."""
    choose_interface()
    if recipe.training.num_threads:
        torch.set_num_threads(recipe.training.num_threads)
    # cpu=True where there is no accelerator: otherwise accelerate would not join the processes of a launch (over gloo).
    on_cpu = not torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    patience = _patience(recipe)
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if shards and on_cpu:
        allow_fsdp_on_cpu(patience)
    plugin = sharding(compute_dtype(recipe.model.dtype, device)) if shards else None
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # the policy's passes and the plugin say what is computed in which type
        gradient_accumulation_steps=1,
        fsdp_plugin=plugin,
        parallelism_config=hybrid_sharding() if shards else None,
        kwargs_handlers=[patience],
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.FSDP:
        accelerator.state.fsdp_plugin = plugin  # a second accelerator of a process would keep the first one's
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed steps its own optimizer and is not supported; FSDP2 shards the same state: "
            "accelerate launch --config_file launch/fsdp2.yaml"
        )
    watch_peers(accelerator, recipe.training.peer_timeout, patience.timeout.total_seconds())
    prepare_process()
    P, W = recipe.training.prompts_per_step, accelerator.num_processes
    if P % W:
        raise UserError(
            f"training.prompts_per_step ({P}) does not divide by the {W} processes of this launch; "
            f"use {P - P % W or W} or {P + W - P % W} (a run that resumes: a number of processes that divides {P})"
        )
    return accelerator


def resolve_dtype(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with ``model.dtype: auto`` replaced by the type that suits this device; a line in the log says so. A
    teacher's likewise, of which its loading tells.

    The type is then part of the run's identity: a device that resolves it otherwise can't resume the run.
    """
    device, instructions = accelerator.device, has_bfloat16(accelerator.device)
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if instructions else "float32"
        if accelerator.is_main_process:
            log.info(
                "model.dtype: auto is %s here (this %s %s instructions for bfloat16)",
                dtype,
                device.type,
                "has" if instructions else "has no",
            )
    elif dtype == "bfloat16" and not instructions and accelerator.is_main_process:
        log.warning(
            "this %s has no instructions for bfloat16 and computes it several times as slowly as float32; set "
            "model.dtype: auto or float32",
            device.type,
        )
    resolved: dict[str, Any] = {"model": recipe.model.model_copy(update={"dtype": dtype})}
    if recipe.teacher is not None and recipe.teacher.name is not None and recipe.teacher.dtype == "auto":
        of_teacher = "bfloat16" if instructions else "float32"
        resolved["teacher"] = recipe.teacher.model_copy(update={"dtype": of_teacher})
    return recipe.model_copy(update=resolved)


def _patience(recipe: Recipe) -> InitProcessGroupKwargs:
    """How long a process may wait for the others: longer than a backend may take to give up on a server, or the waiting
    processes would fail first. This ends what hangs; a process that is gone is noticed by ``peers``."""
    rollout = recipe.rollout
    seconds = 600.0
    if rollout.backend in ("auto", "vllm"):
        seconds += rollout.vllm_generation_timeout + rollout.vllm_sync_timeout
        seconds += max(rollout.vllm_server_timeout, rollout.vllm_start_timeout)
    return InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.training.ddp_timeout or max(seconds, 1800.0)))


def sharding(compute_dtype: torch.dtype) -> FullyShardedDataParallelPlugin:
    """FSDP2 as ``accelerate launch`` configured it, under our own mixed precision (``mixed_precision_policy``).

    Raises UserError for FSDP1.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise UserError("FSDP1 is not supported; set fsdp_version: 2, as launch/fsdp2.yaml does")
    plugin.mixed_precision_policy = mixed_precision_policy(compute_dtype)
    return plugin


class _HybridSharding(ParallelismConfig):
    """HSDP whose gradients FSDP2 reduces over a node alone. The update averages them over nodes, once a step."""

    @property
    def fsdp_dim_names(self) -> list[str]:
        return ["dp_shard"]


def hybrid_sharding() -> ParallelismConfig | None:
    """HSDP, where ``accelerate launch`` configured it (launch/hsdp.yaml); None where FSDP2 shards over all processes.

    Raises UserError where its sizes do not fit the launch.
    """
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    config, processes = _HybridSharding(), int(os.environ.get("WORLD_SIZE", "1"))
    replicate, shard = config.dp_replicate_size, config.dp_shard_size
    if config.non_data_parallel_size > 1:
        raise UserError("tensor, context and sequence parallelism are not supported; launch/hsdp.yaml shows what is")
    if replicate * shard != processes or shard == 1:
        raise UserError(
            f"{processes} processes can't be dp_replicate_size {replicate} times dp_shard_size {shard}. Give "
            "accelerate launch --parallelism_config_dp_replicate_size NODES and --parallelism_config_dp_shard_size "
            "PROCESSES_OF_A_NODE (2 or more)"
        )
    return config


def allow_fsdp_on_cpu(patience: InitProcessGroupKwargs) -> None:
    """Let ``accelerate launch --use_fsdp`` shard over gloo: accelerate reads FSDP's switches on accelerators only."""
    state = PartialState(cpu=True, **patience.to_kwargs())
    if state.distributed_type == DistributedType.MULTI_CPU and state.num_processes > 1:
        state.distributed_type = DistributedType.MULTI_GPU


def prepare_tokenizer(recipe: Recipe) -> tuple[Any, list[int]]:
    """Tokenizer, and the token ids that end a completion."""
    tokenizer = load_tokenizer(recipe.model)
    return tokenizer, stop_token_ids(tokenizer, *load_configs(recipe.model))


def prepare_task(
    recipe: Recipe, tokenizer: Any = None, tools: Sequence[dict[str, Any]] = ()
) -> tuple[Any, list[int], Task]:
    """Tokenizer, the token ids that end a completion, and the task. Chat templates show ``tools`` (JSON schemas) in its
    prompts: of a recipe that is sampled from, ``environments.prepared`` knows them. Raises UserError with all problems
    at once."""
    tokenizer = load_tokenizer(recipe.model) if tokenizer is None else tokenizer
    config, generation_config = load_configs(recipe.model)
    task = load_task(recipe, tokenizer, tools)
    for warning in check_before_loading(recipe, tokenizer, config, generation_config, task):
        log.warning(warning)
    check_same_on_all(recipe, task)
    return tokenizer, stop_token_ids(tokenizer, config, generation_config), task


_kept: list[Any] = []  # keeps what holds a process group alive, to the end of the process


def leave(accelerator: Accelerator, policy: Any) -> None:
    """Leave the launch's processes; the last thing a stage does.

    When a gloo group is destroyed, it waits for its thread while holding the interpreter's lock. The thread may need
    that lock to free the last tensors it sent: a deadlock, in a few of a thousand runs. So the thread gets a moment
    first, and what holds a group is never destroyed.
    """
    if accelerator.num_processes > 1:
        _kept.extend([policy, torch.distributed.group.WORLD])
        sleep(0.2)
    accelerator.end_training()
