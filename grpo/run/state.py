"""The state of a run between two steps, and how a checkpoint saves and restores it.

Because every random draw is a function of its key, this is short: weights, optimizer, a moving reference, and counters.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from grpo.config import Recipe
from grpo.errors import RunError
from grpo.model.first_process import on_each, on_main
from grpo.model.moments import empty_moments, load_moments, moments, optimized
from grpo.model.placing import assign
from grpo.model.policy import Policy
from grpo.run.checkpoint import (
    Checkpoint,
    begin,
    commit,
    discard,
    load_checkpoint,
    save_checkpoint,
    set_aside_newer,
)
from grpo.run.manifest import SHARDS, facts
from grpo.run.same_run import run_identity
from grpo.run.shards import read_shards, stored_tensors, write_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("grpo")

BEST = "best"  # in checkpoints/: the states of the best models (``rollback.py``)


@dataclass
class Progress:
    """Where a run stands between two steps."""

    step: int = 0
    num_tokens: int = 0
    """Tokens of prompts and completions, sampled or (in the supervised stage) imitated."""
    seconds: float = 0.0
    """Time spent in steps; evaluation and saving are not in it."""
    metrics_offset: int = 0
    """Bytes of metrics.jsonl when the checkpoint was written."""
    rollout_ahead: list[dict[str, Any]] | None = None
    """What was asked for of later steps before the checkpoint: ``Rollouts.state``."""
    micro_batch_limit: int | None = None
    """Tokens found to fit in a micro-batch; None while the recipe's number alone counts."""
    entropy_control: tuple[float, float] | None = None
    """The adaptive entropy bonus: its coefficient, and the entropy that the last update measured."""
    extra_prompts: int = 0
    """Prompts that the steps so far drew beyond ``prompts_per_step`` each."""
    pass_rates: dict[int, float] = field(default_factory=dict)
    """Pass rates of the rows seen so far, by row id, for the curriculum."""
    replay: list[dict[str, Any]] = field(default_factory=list)
    """Groups with signal from earlier steps, oldest first."""
    unfinished: bool = False
    """The step is made, and what follows it (evaluation, rules of health) is to be done once more."""


def identity(recipe: Recipe, policy: Policy, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    return identity_on(recipe, policy.accelerator, inputs)


def identity_on(recipe: Recipe, accelerator: Accelerator, inputs: Mapping[str, str] | None = None) -> dict[str, Any]:
    threads = torch.get_num_threads() if accelerator.device.type == "cpu" else None
    return run_identity(recipe, world_size=accelerator.num_processes, threads=threads, inputs=inputs)


def save_state(
    folder: Path, recipe: Recipe, policy: Policy, progress: Progress, inputs: Mapping[str, str] | None = None
) -> None:
    """Write checkpoints/step_N of a run's folder, as ``write_state`` does."""
    root = folder / "checkpoints"
    write_state(root, recipe, policy, progress, inputs, keep=recipe.training.save_total_limit)


def write_state(
    root: Path, recipe: Recipe, policy: Policy, progress: Progress, inputs: Mapping[str, str] | None, *, keep: int
) -> None:
    """Write ``root``/step_N. Called by all processes. The first one writes; where weights are sharded, each writes its
    own part. ``inputs`` are the hashes of what the run is made from (``inputs.py``)."""
    states, manifest = {"progress": asdict(progress)}, identity(recipe, policy, inputs or None)
    if policy.sharded:
        aside = on_main(policy.accelerator, lambda: begin(root, progress.step))
        try:
            rank = policy.accelerator.process_index
            files = write_shards(aside / SHARDS, _tensors(recipe, policy) | _moments(policy), rank)
            shards = dict(item for mine in on_each(lambda: {f.name: facts(f) for f in files}) for item in mine.items())
        except RunError:
            on_main(policy.accelerator, lambda: discard(aside))
            raise
        on_main(policy.accelerator, lambda: commit(aside, states=states, manifest=manifest, keep=keep, shards=shards))
        return
    tensors = {"model": policy.trained_state()}
    if (reference := _moving_reference(recipe, policy)) is not None:
        tensors["reference"] = reference.state_dict()
    states["optimizer"] = policy.optimizer_state()
    on_main(
        policy.accelerator,
        lambda: save_checkpoint(root, progress.step, tensors=tensors, states=states, manifest=manifest, keep=keep),
    )


def _moving_reference(recipe: Recipe, policy: Policy) -> PreTrainedModel | None:
    return policy.reference.causal_lm if policy.reference is not None and recipe.algorithm.sync_ref_model else None


def _tensors(recipe: Recipe, policy: Policy) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds, by the names that they have in its shards: they themselves, not copies."""
    found = {f"model.{name}": tensor for name, tensor in policy.trained_state().items()}
    if (reference := _moving_reference(recipe, policy)) is not None:
        found |= {f"reference.{name}": parameter.detach() for name, parameter in reference.named_parameters()}
    return found


def _moments(policy: Policy) -> dict[str, torch.Tensor]:
    found = moments(optimized(policy.model, policy.optimizer), policy.optimizer)
    return {f"optimizer.{name}": tensor for name, tensor in found.items()}


def restore_state(path: Path | None, recipe: Recipe, policy: Policy) -> Progress:
    """Load a checkpoint, which was verified and is this run's, into the policy; every process reads its part. What is
    newer is set aside; without a checkpoint, what an interrupted start has left of best models."""
    root = Path(recipe.training.output_dir) / "checkpoints"
    if path is None:
        if policy.accelerator.is_main_process:
            set_aside_newer(root / BEST, -1)
        return Progress()
    checkpoint = load_state(path, recipe, policy)
    if policy.accelerator.is_main_process:
        for folder in (root, root / BEST):
            set_aside_newer(folder, checkpoint.step)
        log.info("resuming from %s", path)
    progress = Progress(**checkpoint.states["progress"])
    if checkpoint.manifest["recipe"]["training"]["micro_batch_tokens"] != recipe.training.micro_batch_tokens:
        progress.micro_batch_limit = None  # a recipe that asks for another size gets it
    return progress


def load_state(path: Path, recipe: Recipe, policy: Policy) -> Checkpoint:
    """Weights, moments and a moving reference of a checkpoint, which was verified, into the policy. Called by all
    processes; each reads its part. Returns what else the checkpoint holds."""
    policy.changed()
    # Else each process of a machine would hold all of it in the host's memory, to keep a part, or a copy on its device.
    checkpoint = load_checkpoint(path, lazily=policy.sharded or policy.device.type != "cpu")
    if checkpoint.shards is None:
        _restore_whole(checkpoint, policy)
    else:
        _restore_shards(checkpoint.shards, recipe, policy)
    policy.accelerator.wait_for_everyone()
    return checkpoint


def _restore_whole(checkpoint: Checkpoint, policy: Policy) -> None:
    policy.load_trained_state(checkpoint.tensors["model"])
    policy.load_optimizer_state(checkpoint.states["optimizer"])
    if "reference" in checkpoint.tensors and policy.reference is not None:
        targets = policy.reference.causal_lm.state_dict()
        for name, tensor in checkpoint.tensors["reference"].items():
            assign(targets[name], tensor)


def _restore_shards(folder: Path, recipe: Recipe, policy: Policy) -> None:
    prefix, named = "optimizer.", optimized(policy.model, policy.optimizer)
    stored = {n.removeprefix(prefix): of for n, of in stored_tensors(folder).items() if n.startswith(prefix)}
    empty = empty_moments(named, stored)
    into = _tensors(recipe, policy) | {f"{prefix}{name}": tensor for name, tensor in empty.items()}
    read_shards(folder, into, together=policy.sharded)
    load_moments(named, policy.optimizer, empty)
