"""Scoring: reward functions over groups of completions, in processes that may hang, crash or eat memory.

A function is called once a group, in a worker that is killed when it is late. What could not be scored is None and
counted by its cause; too much of it ends the run.

``step.py`` is the scoring of one step, ``pool.py`` the processes, ``process.py`` one of them seen from here and
``worker.py`` the process itself, ``messages.py`` what the two say to each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grpo.config import RewardConfig, ScoringConfig
from grpo.scoring.functions import locate, start_own_workers
from grpo.scoring.pool import Pool
from grpo.scoring.step import ScoredFunction, StepScoring, check_columns
from grpo.types import Group


class Scorer:
    """The reward functions of a recipe and the processes they run in.

    ``names`` are the functions' names in metrics, in the recipe's order: a built-in's own, a user function's name, made
    unique by a number. Close it, or use it as a context manager.

    Raises:
        UserError: a function cannot be found or loaded; every such function is named with its file and cause.
    """

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig, *, max_steps: int = 0) -> None:
        specs = locate(rewards, scoring)
        self._own_workers = start_own_workers(specs, scoring.workers)
        try:
            self._pool = Pool(specs, scoring, max_steps, run_here=self._own_workers)
        except BaseException:
            self._stop_own_workers()
            raise
        self.functions = [
            ScoredFunction(spec, signature, reward.weight, reward.needs_group)
            for spec, signature, reward in zip(specs, self._pool.signatures, rewards, strict=True)
        ]
        self.names = [spec.key for spec in specs]
        self._max_failure_rate = scoring.max_failure_rate
        self._told: set[int] = set()  # functions whose first failure has been shown

    @property
    def worker_pids(self) -> list[int]:
        return self._pool.pids

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise UserError where a function needs a column that rows with these do not have, or where names clash."""
        check_columns(self.functions, columns)

    def score(self, groups: Sequence[Group], step: int) -> None:
        """Fill ``rewards``, ``rewards_by_function``, ``verdicts``, ``extra_metrics``, ``extra_columns`` of every group.

        ``step`` is what functions see as ``trainer_state.global_step``. Completions that ended in ``Status.ERROR`` are
        not handed to any function and have no reward.

        Raises:
            UserError: a function needs a column that the rows do not have, or a column has a name that is taken.
            RunError: a function broke its contract, or more of a step failed than ``scoring.max_failure_rate`` allows.
        """
        scoring = self.start(step)
        for group in groups:
            scoring.add(group)
        scoring.finish()

    def start(self, step: int) -> StepScoring:
        """The same, for groups that come one after the other: they are scored while others are still sampled."""
        return StepScoring(self.functions, self._pool, step, self._max_failure_rate, self._told)

    def close(self) -> None:
        """End the workers, whatever they are doing. May be called twice."""
        self._stop_own_workers()
        self._pool.close()

    def _stop_own_workers(self) -> None:
        for module in self._own_workers.values():
            module.stop()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
