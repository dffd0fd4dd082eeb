"""A run under way: what every stage has set up, and the loop around its steps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from pydantic import ValidationError

from grpo.config import OptimizerConfig, Recipe
from grpo.errors import Preempted, RunError
from grpo.health.watch import ROLLBACK, Demand
from grpo.model.optimizer import learning_rate
from grpo.model.policy import Policy
from grpo.prompts.task import Task
from grpo.randomness import Stream, key
from grpo.run import agreement, peers, stopping
from grpo.run.folder import prepare_run_folder
from grpo.run.inputs import hash_inputs
from grpo.run.log import RunLog
from grpo.run.manifest import read_manifest
from grpo.run.nodes import check_checkpoint, check_folder
from grpo.run.rollback import KEPT, go_back, state_of_best, states_of_best, why_not
from grpo.run.same_run import check_same_run, differences
from grpo.run.screen import Tell, working
from grpo.run.search import find_checkpoint
from grpo.run.secrets import recipe_without_secrets
from grpo.run.session import on_main
from grpo.run.state import Progress, identity_on, restore_state, save_state, write_state

log = logging.getLogger("grpo")


@dataclass
class Run:
    """One process's part of a run: the recipe, the policy that learns, the folder, and how far it has come.

    Within ``with run:`` its log is open (on the first process; the others have one that writes nothing), and processes
    listen to requests to stop (``stopping``).
    """

    recipe: Recipe
    policy: Policy
    folder: Path
    progress: Progress = field(default_factory=Progress)
    resumed: bool = False
    inputs: dict[str, str] = field(default_factory=dict)
    """Hashes of what it is made from, for its checkpoints; on the first process."""
    card: Callable[[Path], str | None] = lambda folder: None
    """The model card of a folder that the run writes, ``best/`` or ``final/``."""

    def __post_init__(self) -> None:
        self._began = self.progress.step
        self._concluded = self.progress.step - self.progress.unfinished  # the last step that nothing is due after
        self._marked: tuple[Progress, int] | None = None

    @property
    def accelerator(self) -> Accelerator:
        return self.policy.accelerator

    def __enter__(self) -> Run:
        with ExitStack() as opened:
            self.log = opened.enter_context(self._open_log())
            opened.enter_context(stopping.listening())
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if isinstance(error[1], KeyboardInterrupt):
                self._save_marked()
        finally:
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

    def steps(
        self,
        evaluate: Callable[[], None],
        ahead: Callable[[bool], Any] = lambda wait: None,
        anew: Callable[[], None] = lambda: None,
    ) -> Iterator[int]:
        """The number of each step to make, until steps or seconds are used up or the run is asked to stop.

        The body of the loop makes the step and moves ``progress`` on by one. Between two steps ``evaluate`` is called
        and a checkpoint written where the recipe says so; ``ahead`` returns what is already asked for of later steps,
        for the checkpoint: it waits for what is in flight, but not where the run was asked to stop. ``anew`` is called
        where the run went back to its best model: what was sampled ahead is of another.

        Raises:
            Preempted: a process was asked to stop; after a checkpoint, if a step was made.
            RunError: processes have drifted apart (``agreement``), or a rule of health stops the run.
        """
        training = self.recipe.training
        if self.progress.step == 0 and self.recipe.evaluation.at_start:
            evaluate()  # of the model that the run starts from, which is somewhere already
            if self.recipe.health.rolls_back():
                self._keep_state_of_best()
        stopping.wait_for_steps()
        if not self.finished() and self._asked_to_stop():
            raise Preempted(stopping.BEFORE, stopping.code())
        first = self.progress.step
        if first and self.finished() and self.accelerator.is_main_process:
            log.info("nothing is left to train: the run is at step %d of %d", first, training.max_steps)
        if self.progress.unfinished:
            self._after_step(evaluate, ahead, anew)
        while not self.finished():
            if self.progress.step == first or due(training.replica_check_every, self.progress.step):
                self._check_replicas()
            self._seed_step()
            peers.at_step(self.progress.step + 1)
            self._mark(unfinished=False)
            yield self.progress.step
            self._after_step(evaluate, ahead, anew)
        stopping.wait_no_more()

    def _after_step(self, evaluate: Callable[[], None], ahead: Callable[[bool], Any], anew: Callable[[], None]) -> None:
        """Evaluate, keep the best model, heed the rules of health and save, where each is due."""
        training = self.recipe.training
        self._mark(unfinished=True)
        asked, done = self._asked_to_stop(), self.finished()
        if done or due(training.eval_every, self.progress.step):
            evaluate()
            self._keep_if_best()
            done = self.finished()  # patience may be used up
            asked = asked or self._asked_to_stop()  # while it was evaluated
        if not done:
            self._heed_health(anew)
        self._mark(unfinished=False)
        if done or asked or due(training.save_every, self.progress.step):
            self.progress.rollout_ahead = None if done else ahead(not asked)
            self.save()
        if asked and not done:
            raise Preempted(f"{stopping.WHY[stopping.code()]}: {self.saved()}", stopping.code())

    def _asked_to_stop(self) -> bool:
        """Whether any process was asked to stop; the same answer on every process."""
        asked = torch.tensor(float(stopping.asked()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _keep_if_best(self) -> None:
        """Write ``best/`` where the evaluation just made is the best so far."""
        if self.recipe.training.save_best is None:
            return
        if on_main(self.accelerator, lambda: self.log.best.step == self.progress.step):
            folder = self.folder / "best"
            with self.log.phase("saving the best model"):
                self.policy.save_pretrained(folder, lambda: self.card(folder))
            if self.recipe.health.rolls_back():
                self._keep_state_of_best()
            if self.accelerator.is_main_process:
                log.info("best so far: %s %.4f, in %s", self.log.best.metric, self.log.best.value, folder)

    def _keep_state_of_best(self) -> None:
        """Keep what ``rollback`` needs of the evaluation just made."""
        self.progress.metrics_offset = self.log.offset
        root = states_of_best(self.folder)
        write_state(root, self.recipe, self.policy, self.progress, self.inputs, keep=KEPT)

    def _heed_health(self, anew: Callable[[], None]) -> None:
        """Do what the recipe wants where a rule of health holds: go back to the best model, or raise RunError after a
        checkpoint."""
        health = self.recipe.health
        if not {"stop", "rollback"} & set(health.model_dump().values()):
            return

        def look() -> tuple[Demand | None, str | None, Path]:
            demand, best, why = self.log.demand(), self.log.best, None
            if demand is not None and demand.action == ROLLBACK:
                why = why_not(self.folder, best, health.max_rollbacks)
            return demand, why, state_of_best(self.folder, best)

        demand, why, path = on_main(self.accelerator, look)
        if demand is None:
            return
        if demand.action == ROLLBACK and why is None:
            with self.log.phase("going back to the best model"):
                self.progress = go_back(path, self.recipe, self.policy, self.progress)
                anew()
            self.log.roll_back(self.progress.step, demand.rule, health.max_rollbacks)
            return
        self._mark(unfinished=False)
        self.save()
        also = f"; {why}" if why else ""
        raise RunError(
            f"stopped by health.{demand.rule}: {demand.statement} (step {self.progress.step}){also}\n{self.saved()}"
        )

    def _mark(self, *, unfinished: bool) -> None:
        """Note the state between two steps: until weights change, a checkpoint of it can be written."""
        self._concluded = self.progress.step - unfinished
        progress = replace(self.progress, metrics_offset=self.log.size, unfinished=unfinished)
        self._marked = progress, self.policy.changes

    def _save_marked(self) -> None:
        """At a second Ctrl-C: raise Preempted after a checkpoint of the last step, if no later one has changed
        anything. Several processes can't agree on that within a step: nothing is saved then."""
        if self._marked is None or self.accelerator.num_processes > 1:
            return
        progress, changes = self._marked
        if progress.step == self._began or changes != self.policy.changes or self.progress.step != progress.step:
            return
        stopping.wait_for_steps()  # a third one ends it
        progress.metrics_offset = min(progress.metrics_offset, self.log.offset)  # which syncs it to the disk
        self.progress = progress
        save_state(self.folder, self.recipe, self.policy, progress, self.inputs)
        raise Preempted(f"{stopping.WHY[130]}: {self.saved()}", 130)

    def _check_replicas(self) -> None:
        if self.recipe.training.replica_check_every:
            agreement.check_weights(self.policy, self.progress.step)

    def finished(self) -> bool:
        """Whether steps, seconds or patience are used up; the same answer on every process (the first's counts)."""
        if self.progress.step >= self.recipe.training.max_steps:
            return True
        patience = self.recipe.training.patience
        if patience is not None and on_main(self.accelerator, lambda: self.log.best.stale >= patience):
            return True
        limit = self.recipe.training.max_seconds
        return limit is not None and on_main(self.accelerator, lambda: self.progress.seconds >= limit)

    def _seed_step(self) -> None:
        """Seed torch's global generator, from which only dropout draws, by the step: so its state is never saved."""
        seed, step, rank = self.recipe.training.seed, self.progress.step, self.accelerator.process_index
        torch.manual_seed(key(seed, Stream.DROPOUT.value, step, rank) >> 1)

    def save(self) -> None:
        """Write a checkpoint. Called by all processes. Raises RunError where they have drifted apart."""
        self._check_replicas()
        self.progress.metrics_offset = self.log.offset
        self.progress.unfinished = self.progress.step != self._concluded
        with self.log.phase("saving a checkpoint"):
            save_state(self.folder, self.recipe, self.policy, self.progress, self.inputs)

    def save_final(self) -> None:
        """Write ``final/``, what ``from_pretrained`` loads, with its model card. Called by all processes, when the log
        is closed."""
        final = self.folder / "final"
        with working(f"saving {final}", shown=self.accelerator.is_main_process):
            self.policy.save_pretrained(final, lambda: self.card(final))

    def saved(self) -> str:
        """The last message of a run that ends early."""
        checkpoint = self.folder / "checkpoints" / f"step_{self.progress.step:06d}"
        return f"saved {checkpoint}; start again with --resume"


def start_run(
    recipe: Recipe,
    accelerator: Accelerator,
    tokenizer: Any,
    stop_token_ids: list[int],
    task: Task,
    resume: bool | str,
    *,
    needs_reference: bool = False,
    allow_changed_inputs: bool = False,
    card: Callable[[Path], str | None] = lambda folder: None,
) -> Run:
    """Claim the run's folder, load the policy, and restore the checkpoint of ``resume``: True for the newest, or a
    path. The folder comes first, so that a mistake about it is found before weights load. ``card`` is the run's."""
    folder, checkpoint, inputs = on_main(
        accelerator, lambda: _claim(recipe, accelerator, task, resume, allow_changed_inputs)
    )
    check_folder(folder, accelerator)
    check_checkpoint(checkpoint)
    with working(f"loading weights of {recipe.model.name}", shown=accelerator.is_main_process):
        policy = Policy(recipe, accelerator, tokenizer, stop_token_ids, needs_reference)
    progress = restore_state(checkpoint, recipe, policy)
    return Run(recipe, policy, folder, progress, resumed=bool(resume), inputs=inputs, card=card)


def _claim(
    recipe: Recipe, accelerator: Accelerator, task: Task, resume: bool | str, allow_changed_inputs: bool
) -> tuple[Path, Path | None, dict[str, str]]:
    """The run's folder, the checkpoint in it to go on from, and the hashes of what the run is made from.

    Raises UserError, having changed nothing, where the folder is another's, or a checkpoint another run's.
    """
    inputs = hash_inputs(recipe, task)
    found: list[Path | None] = [None]

    def check(folder: Path) -> None:
        found[0] = find_checkpoint(folder, resume)
        if found[0] is not None:
            manifest, now = read_manifest(found[0]), identity_on(recipe, accelerator, inputs)
            check_same_run(manifest, now, allow_changed_inputs=allow_changed_inputs)
            say_if_schedule_changes(manifest, recipe)

    return prepare_run_folder(recipe, resume, check, inputs), found[0], inputs


def say_if_schedule_changes(manifest: Mapping[str, Any], recipe: Recipe) -> None:
    """Warn where the next step's learning rate is not the one that the run in the checkpoint would have had."""
    try:
        before = Recipe.model_validate(manifest["recipe"])
    except ValidationError:  # of an earlier version, with a key that is gone
        return
    step = manifest["step"]
    old, new = (learning_rate(r.optimizer, step, r.training.max_steps) for r in (before, recipe))
    if old != new:
        keys = {f"optimizer.{key}" for key in OptimizerConfig.model_fields} | {"training.max_steps"}
        changed = differences(before.model_dump(mode="json"), recipe_without_secrets(recipe))
        why = ", ".join(f"{key}: {was} -> {now}" for key, was, now in changed if key in keys)
        log.warning("the learning rate of step %d is %.3g, and would have been %.3g (%s)", step + 1, new, old, why)


def due(every: int, step: int) -> bool:
    """Whether something done ``every`` so many steps (0: never) is due after step ``step``."""
    return every > 0 and step % every == 0


class _Silent:
    """The log of a process that is not the first."""

    offset = size = 0

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None: ...

    def log(self, *_: object, **__: object) -> None: ...

    def log_rollouts(self, *_: object, **__: object) -> None: ...

    def roll_back(self, *_: object) -> None: ...

    def phase(self, *_: object) -> AbstractContextManager[Tell]:
        return nullcontext(lambda done: None)
