"""A run under way: what every stage has set up, and the loop around its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from grpo.config import Recipe
from grpo.errors import Preempted
from grpo.model.policy import Policy
from grpo.randomness import Stream, key
from grpo.run import peers
from grpo.run.folder import prepare_run_folder
from grpo.run.log import RunLog
from grpo.run.nodes import check_checkpoint, check_folder
from grpo.run.secrets import recipe_without_secrets
from grpo.run.session import PreemptionGuard, on_main
from grpo.run.state import Progress, find_checkpoint, restore_state, save_state


@dataclass
class Run:
    """One process's part of a run: the recipe, the policy that learns, the folder, and how far it has come.

    Within ``with run:`` its log is open (on the first process; the others have one that writes nothing), and a request
    to stop (SIGTERM, SIGUSR1) waits for the end of a step.
    """

    recipe: Recipe
    policy: Policy
    folder: Path
    progress: Progress = field(default_factory=Progress)
    resumed: bool = False

    @property
    def accelerator(self) -> Accelerator:
        return self.policy.accelerator

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            self.log = opened.enter_context(self._open_log())
            self.preemption = opened.enter_context(PreemptionGuard(self.accelerator))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def _open_log(self) -> RunLog:
        if not self.accelerator.is_main_process:
            return cast(RunLog, _Silent())
        return RunLog(
            self.folder,
            self.recipe.tracking,
            recipe_dict=recipe_without_secrets(self.recipe),
            total_steps=self.recipe.training.max_steps,
            resume_offset=self.progress.metrics_offset if self.resumed else None,
        )

    def steps(self, evaluate: Callable[[], None], ahead: Callable[[bool], Any] = lambda wait: None) -> Iterator[int]:
        """The number of each step to make, until steps or seconds are used up or the run is asked to stop.

        The body of the loop makes the step and moves ``progress`` on by one. Between two steps ``evaluate`` is called
        and a checkpoint written where the recipe says so; ``ahead`` returns what is already asked for of later steps,
        for the checkpoint: it waits for what is in flight, but not where the run was asked to stop. Raises Preempted,
        after a checkpoint, where a process was asked to stop.
        """
        training = self.recipe.training
        if self.progress.step == 0 and self.recipe.evaluation.at_start:
            evaluate()
        while not self.finished():
            self._seed_step()
            peers.at_step(self.progress.step + 1)
            yield self.progress.step
            stopping, done = self.preemption.requested(), self.finished()
            if done or due(training.eval_every, self.progress.step):
                evaluate()
            if done or stopping or due(training.save_every, self.progress.step):
                self.progress.rollout_ahead = None if done else ahead(not stopping)
                self.save()
            if stopping and not done:
                raise Preempted(f"asked to stop: {self.saved()}")

    def finished(self) -> bool:
        """Whether steps or seconds are used up; the same answer on every process (the first one's clock counts)."""
        if self.progress.step >= self.recipe.training.max_steps:
            return True
        limit = self.recipe.training.max_seconds
        return limit is not None and on_main(self.accelerator, lambda: self.progress.seconds >= limit)

    def _seed_step(self) -> None:
        """Seed torch's global generator, from which only dropout draws, by the step: so its state is never saved."""
        seed, step, rank = self.recipe.training.seed, self.progress.step, self.accelerator.process_index
        torch.manual_seed(key(seed, Stream.DROPOUT.value, step, rank) >> 1)

    def save(self) -> None:
        """Write a checkpoint. Called by all processes."""
        self.progress.metrics_offset = self.log.offset
        save_state(self.folder, self.recipe, self.policy, self.progress)

    def saved(self) -> str:
        """The last message of a run that ends early."""
        checkpoint = self.folder / "checkpoints" / f"step_{self.progress.step:06d}"
        return f"saved {checkpoint}; start again with --resume"


def start_run(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: Any,
    stop_token_ids: list[int],
    resume: bool | str,
    *,
    needs_reference: bool = False,
) -> Run:
    """Claim the run's folder, load the policy, and restore the checkpoint of ``resume``: True for the newest, or a
    path. The folder comes first, so that a mistake about it is found before weights load."""
    folder = on_main(accelerator, lambda: prepare_run_folder(recipe, resume))
    check_folder(folder, accelerator)
    policy = Policy(recipe, accelerator, tokenizer, stop_token_ids, needs_reference)
    checkpoint = on_main(accelerator, lambda: find_checkpoint(folder, resume))
    check_checkpoint(checkpoint)
    return Run(recipe, policy, folder, restore_state(checkpoint, recipe, policy), resumed=bool(resume))


def due(every: int, step: int) -> bool:
    """Whether something done ``every`` so many steps (0: never) is due after step ``step``."""
    return every > 0 and step % every == 0


class _Silent:
    """The log of a process that is not the first."""

    offset = 0

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def log(self, *_: object, **__: object) -> None: ...

    def log_rollouts(self, *_: object, **__: object) -> None: ...
