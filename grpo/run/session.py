"""What every stage sets up around its loop: processes, folder, tokenizer and data, log, clock, preemption.

A stage calls these in the order that makes mistakes cheap: data and reward functions are checked before anything is
written, the folder is claimed before any weights load.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from grpo.config import Recipe
from grpo.errors import Preempted, RunError, UserError
from grpo.kernels import prepare_process
from grpo.model.devices import compute_dtype, has_bfloat16
from grpo.model.loading import load_configs, load_tokenizer
from grpo.prompts.task import Task, lint, load_task, stop_token_ids
from grpo.randomness import Stream, key
from grpo.run.folder import prepare_run_folder
from grpo.run.log import Tracker
from grpo.run.state import Progress

log = logging.getLogger("grpo")
T = TypeVar("T")


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate as ``accelerate launch`` configured it; accumulation stays at 1 (``step.py`` does its own)."""
    if recipe.training.num_threads:
        torch.set_num_threads(recipe.training.num_threads)
    # Without an accelerator, say so: accelerate then joins the processes of a launch over gloo instead of not at all.
    on_cpu = not torch.accelerator.is_available()
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    precision = "bf16" if compute_dtype(recipe.model.dtype, device) == torch.bfloat16 else "no"
    accelerator = Accelerator(
        cpu=on_cpu, mixed_precision=precision, gradient_accumulation_steps=1, kwargs_handlers=[_patience(recipe)]
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "DeepSpeed steps its own optimizer and is not supported; FSDP2 shards the same state: "
            "accelerate launch --config_file launch/fsdp2.yaml"
        )
    if on_cpu:
        allow_fsdp_on_cpu(accelerator)
    prepare_process()
    P, W = recipe.training.prompts_per_step, accelerator.num_processes
    if P % W:
        raise UserError(
            f"training.prompts_per_step ({P}) does not divide by the {W} processes of this launch; "
            f"use {P - P % W or W} or {P + W - P % W}"
        )
    return accelerator


def resolve_dtype(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with ``model.dtype: auto`` replaced by the type that suits this device; a line in the log says so.

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
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


def _patience(recipe: Recipe) -> InitProcessGroupKwargs:
    """How long a process may wait for the others: longer than a backend may take to give up on a server, or the ones
    that wait would be the first to fail."""
    rollout = recipe.rollout
    seconds = 600.0
    if rollout.backend == "vllm":
        seconds += rollout.vllm_generation_timeout + rollout.vllm_server_timeout + rollout.vllm_sync_timeout
    return InitProcessGroupKwargs(timeout=timedelta(seconds=max(seconds, 1800.0)))


def allow_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Let ``accelerate launch --use_fsdp`` shard over gloo: accelerate reads the switch on accelerators only."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and accelerator.num_processes > 1:
        PartialState().distributed_type = DistributedType.FSDP  # AcceleratorState copies it whenever it is asked for
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on the first process and give its result, or its UserError or RunError, to every process."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except (UserError, RunError) as error:
            outcome = [None, error]
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def prepare_folder(recipe: Recipe, accelerator: Accelerator, resume: bool | str) -> Path:
    return on_main(accelerator, lambda: prepare_run_folder(recipe, resume))


def prepare_task(recipe: Recipe) -> tuple[Any, list[int], Task]:
    """Tokenizer, the token ids that end a completion, and the task; lint problems raise UserError, all at once."""
    tokenizer = load_tokenizer(recipe.model)
    config, generation_config = load_configs(recipe.model)
    task = load_task(recipe, tokenizer)
    for warning in lint(recipe, tokenizer, config, generation_config, task):
        log.warning(warning)
    return tokenizer, stop_token_ids(tokenizer, config, generation_config), task


@contextmanager
def open_tracker(
    folder: Path, recipe: Recipe, accelerator: Accelerator, progress: Progress, resume: bool | str
) -> Iterator[Tracker]:
    """The run's log on the first process; the others get one that says nothing."""
    if not accelerator.is_main_process:
        yield cast(Tracker, _Silent())
        return
    tracker = Tracker(
        folder,
        recipe.tracking,
        recipe_dict=recipe.model_dump(mode="json"),
        total_steps=recipe.training.max_steps,
        resume_offset=progress.metrics_offset if resume else None,
    )
    with tracker:
        yield tracker


class _Silent:
    offset = 0

    def log(self, *_: object, **__: object) -> None: ...

    def log_rollouts(self, *_: object, **__: object) -> None: ...


_kept: list[Any] = []  # what holds a process group, to the end of the process


def leave(accelerator: Accelerator, policy: Any) -> None:
    """Leave the launch's processes; the last thing a stage does.

    A gloo group that is destroyed waits for its thread while it holds the interpreter's lock, and the thread may want
    that lock to let go of the last tensors it sent: a deadlock of a few in a thousand runs. So the thread gets a moment
    first, and what holds the group (DDP's model) is never destroyed.
    """
    if accelerator.num_processes > 1:
        _kept.append(policy)
        sleep(0.2)
    accelerator.end_training()


def seed_step(recipe: Recipe, step: int, rank: int) -> None:
    """Torch's global generator (dropout alone draws from it) becomes a function of the step, so it needs no saving."""
    torch.manual_seed(key(recipe.training.seed, Stream.DROPOUT.value, step, rank) >> 1)


def due(every: int, step: int) -> bool:
    """Whether something done ``every`` so many steps (0: never) is due after step ``step``."""
    return every > 0 and step % every == 0


def finished(recipe: Recipe, accelerator: Accelerator, progress: Progress) -> bool:
    """Whether steps or seconds are used up; the same answer on every process (the first one's watch counts)."""
    if progress.step >= recipe.training.max_steps:
        return True
    limit = recipe.training.max_seconds
    return limit is not None and on_main(accelerator, lambda: progress.seconds >= limit)


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())


class PreemptionGuard:
    """Turns SIGTERM (and SIGUSR1, Slurm's early warning) into a request that the loop honours between two steps."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = False

    def __enter__(self) -> PreemptionGuard:
        self.previous = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def requested(self) -> bool:
        """Whether any process was asked to stop; the same answer on every process."""
        asked = torch.tensor(float(self.asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def stop(self, folder: Path, step: int) -> None:
        raise Preempted(f"asked to stop (process {os.getpid()}): {saved(folder, step)}")


def saved(folder: Path, step: int) -> str:
    """What a run that ends early says last."""
    return f"saved {folder / 'checkpoints' / f'step_{step:06d}'}; start again with --resume"
