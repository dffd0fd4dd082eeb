"""Scoring: reward functions over groups of completions, in processes that may hang, crash or eat memory.

A function is called once a group, in a worker that is killed when it is late. What could not be scored is None and
counted by its cause; too much of it ends the run.

``step.py`` is the scoring of one step, ``pool.py`` the processes, ``process.py`` one of them seen from here and
``worker.py`` the process itself, ``messages.py`` what the two say to each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from grpo.config import RewardConfig, ScoringConfig
from grpo.scoring.functions import locate, start_own_workers
from grpo.scoring.pool import Pool
from grpo.scoring.step import NOTHING, ScoredFunction, StepScoring, check_columns
from grpo.types import Group


class Scorer:
    """The reward functions of a recipe (``Recipe.functions``) and the processes they run in.

    ``names`` are the functions' names in metrics, in the recipe's order: a built-in's own, a user function's name, made
    unique by a number. Close it, or use it as a context manager.

    Raises:
        UserError: a function cannot be found or loaded; every such function is named with its file and cause.
    """

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig, *, max_steps: int = 0) -> None:
        specs = locate(rewards, scoring)
        called = [spec for spec in specs if not spec.is_paid]
        self._own_workers = start_own_workers(called, scoring.workers)
        try:
            self._pool = Pool(called, scoring, max_steps, run_here=self._own_workers)
        except BaseException:
            self._stop_own_workers()
            raise
        places = {spec.key: place for place, spec in enumerate(called)}
        asked = {spec.key: signature for spec, signature in zip(called, self._pool.signatures, strict=True)}
        self.functions = [
            ScoredFunction(
                spec,
                asked.get(spec.key, NOTHING),
                reward.weight,
                reward.needs_group,
                reward.scores,
                places.get(spec.key),
            )
            for spec, reward in zip(specs, rewards, strict=True)
        ]
        self.names = [spec.key for spec in specs]
        self._max_failure_rate = scoring.max_failure_rate
        self._told: set[int] = set()  # functions whose first failure has been shown

    @property
    def worker_pids(self) -> list[int]:
        return self._pool.pids

    def check_columns(self, columns: Mapping[str, Collection[str]]) -> None:
        """Raise UserError where a function needs a column that rows with these do not have, or where names clash.
        ``columns`` are those of each source that the function may score."""
        for source, of_source in columns.items():
            check_columns(self.functions, of_source, source)

    def score(self, groups: Sequence[Group], step: int) -> None:
        """Fill ``rewards``, ``rewards_by_function``, ``verdicts``, ``extra_metrics``, ``extra_columns`` of every group.

        ``step`` is what functions see as ``trainer_state.global_step``. Completions that ended in ``Status.ERROR`` are
        not handed to any function and have no reward. The reward ``environment`` is what an episode was paid. A
        function that does not score the source of a group is not called for it: its rewards are None, as TRL's are for
        rows of another task, and nothing of it is counted.

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

    def try_out(self, groups: Sequence[Group], place: int, timeout: float) -> list[float | None]:
        """What the function at ``place`` alone says of the groups' completions, one after the other. It has at most
        ``timeout`` seconds a call; failures become None, and are not shown."""
        function = self.functions[place]
        spec = replace(function.spec, timeout=min(timeout, function.spec.timeout))
        functions = [*self.functions[:place], replace(function, spec=spec), *self.functions[place + 1 :]]
        others = set(range(len(functions))) - {place}
        scoring = StepScoring(functions, self._pool, 0, 1.0, told=None, left_out=others)
        for group in groups:
            scoring.add(group)
        scoring.finish()
        return [reward for group in groups for reward in group.rewards_by_function[self.names[place]]]

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
