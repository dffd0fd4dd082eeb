"""The state of a run between two steps, and how a checkpoint saves and restores it.

Because every random draw is a function of its key, this is short: weights, optimizer, a moving reference, and counters.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from grpo.config import Recipe
from grpo.model.policy import Policy
from grpo.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, set_aside_newer
from grpo.run.same_run import check_same_run, run_identity

log = logging.getLogger("grpo")


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


def identity(recipe: Recipe, policy: Policy) -> dict[str, Any]:
    return run_identity(recipe, world_size=policy.accelerator.num_processes, threads=torch.get_num_threads())


def save_state(folder: Path, recipe: Recipe, policy: Policy, progress: Progress) -> None:
    """Write checkpoints/step_N. Called by all processes, which gather what is sharded; the first one writes."""
    tensors = {"model": policy.trained_state()}
    if policy.reference is not None and recipe.algorithm.sync_ref_model:
        tensors["reference"] = policy.reference.causal_lm.state_dict()
    optimizer = policy.optimizer_state()
    if policy.accelerator.is_main_process:
        save_checkpoint(
            folder / "checkpoints",
            progress.step,
            tensors=tensors,
            states={"optimizer": optimizer, "progress": asdict(progress)},
            manifest=identity(recipe, policy),
            keep=recipe.training.save_total_limit,
        )
    policy.accelerator.wait_for_everyone()


def find_checkpoint(folder: Path, resume: bool | str) -> Path | None:
    """The checkpoint to go on from: the one named, or the newest that verifies; None to start at step 0."""
    if not resume:
        return None
    if isinstance(resume, str):
        return Path(resume)
    found = latest_checkpoint(folder / "checkpoints")
    if found is None:
        log.warning("--resume: no checkpoint in %s yet, starting at step 0", folder / "checkpoints")
    return found


def restore_state(path: Path | None, recipe: Recipe, policy: Policy) -> Progress:
    """Load a checkpoint into the policy; every process reads it. Raises UserError where it is another run's."""
    if path is None:
        return Progress()
    checkpoint = load_checkpoint(path)
    check_same_run(checkpoint.manifest, identity(recipe, policy))
    policy.load_trained_state(checkpoint.tensors["model"])
    policy.load_optimizer_state(checkpoint.states["optimizer"])
    if "reference" in checkpoint.tensors and policy.reference is not None:
        policy.reference.causal_lm.load_state_dict(checkpoint.tensors["reference"])
    policy.accelerator.wait_for_everyone()
    if policy.accelerator.is_main_process:
        set_aside_newer(Path(recipe.training.output_dir) / "checkpoints", checkpoint.step)
        log.info("resuming from %s", path)
    progress = Progress(**checkpoint.states["progress"])
    if checkpoint.manifest["recipe"]["training"]["micro_batch_tokens"] != recipe.training.micro_batch_tokens:
        progress.micro_batch_limit = None  # a recipe that asks for another size gets it
    return progress
