"""Scoring: reward functions over groups of completions, in processes that may hang, crash or eat memory.

A function is called once a group, in a worker that is killed when it is late. When a call fails, its completions are
scored again one by one, so that one bad completion costs one; a function that needs its whole group loses the group.
(One by one, not by halves: every call that holds a hanging completion costs a whole timeout, and halving makes
log2(G) + 1 of them.) What could not be scored is None and counted by its cause; too much of it ends the run.

``process.py`` is a worker seen from here, ``worker.py`` the process itself.
"""

from __future__ import annotations

import logging
import pickle
import queue
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from grpo.config import RewardConfig, ScoringConfig
from grpo.errors import RunError, UserError
from grpo.scoring.call import Call, RewardFunction
from grpo.scoring.functions import locate, start_own_workers
from grpo.scoring.process import WorkerFailed, WorkerProcess
from grpo.scoring.worker import Setup
from grpo.types import REWARD_KEYWORDS, Group, Status

logger = logging.getLogger(__name__)

ASYNC_GRACE = 1.0  # seconds in which a worker gives up by itself on an async call that is late
UNSCORABLE_VERDICTS = frozenset({"gold_unparseable", "error"})  # a function's own word for "not the completion's fault"


class Scorer:
    """The reward functions of a recipe and the processes they run in.

    ``names`` are the functions' names in metrics, in the recipe's order: a built-in's own, a user function's name, made
    unique by a number. Close it, or use it as a context manager.

    Raises:
        UserError: a function cannot be found or loaded; every such function is named with its file and cause.
    """

    def __init__(self, rewards: Sequence[RewardConfig], scoring: ScoringConfig, *, max_steps: int = 0) -> None:
        self.functions = locate(rewards, scoring)
        self.names = [function.key for function in self.functions]
        self._weights = [reward.weight for reward in rewards]
        self._needs_group = [reward.needs_group for reward in rewards]
        self._max_failure_rate = scoring.max_failure_rate
        self._told: set[int] = set()  # functions whose first failure has been shown
        self._max_steps = max_steps
        self._own_workers = start_own_workers(self.functions, scoring.workers)
        self._run_here = {index: RewardFunction(self.functions[index]) for index in self._own_workers}
        limit = scoring.memory_limit_gb
        setup = Setup(self.functions, None if limit is None else int(limit * 2**30), max_steps)
        self._workers = [WorkerProcess(setup) for _ in range(scoring.workers)]
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(scoring.workers, "scoring")
        try:
            started = list(self._threads.map(WorkerProcess.start, self._workers))
        except WorkerFailed as why:
            self.close()
            raise UserError(self._load_errors(why)) from None
        except BaseException:
            self.close()
            raise
        self._is_async = [function["is_async"] for function in started[0]]
        self._wants_ids = [function["wants_ids"] for function in started[0]]
        self._needs_columns = [function["needs"] for function in started[0]]
        for worker in self._workers:
            self._idle.put(worker)

    @property
    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self._workers if worker.pid is not None]

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
        return StepScoring(self, step)

    def close(self) -> None:
        """End the workers, whatever they are doing. May be called twice."""
        for module in self._own_workers.values():
            module.stop()
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit(self, job: dict[str, Any], timeout: float) -> Future[list[dict[str, Any]]]:
        """Run a job of calls in the next free worker, or here if the function has its own; from any thread."""
        pickled = pickle.dumps(job)

        def run() -> list[dict[str, Any]]:
            worker = self._idle.get()
            try:
                return worker.run(pickled, len(job["calls"]), timeout)
            finally:
                self._idle.put(worker)

        def run_here() -> list[dict[str, Any]]:
            state = SimpleNamespace(global_step=job["step"], max_steps=self._max_steps)
            return [Call(self._run_here[job["function"]], call, state).run() for call in job["calls"]]

        try:
            return self._threads.submit(run_here if job["function"] in self._run_here else run)
        except RuntimeError:
            raise RunError("scoring was closed") from None

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise UserError where a function needs a column that rows with these do not have, or where names clash."""
        taken = sorted(REWARD_KEYWORDS.intersection(columns))
        if taken:
            raise UserError(
                f"data: the rows have a column {taken[0]!r}, a name under which reward functions get something "
                "else from the trainer; rename or drop the column"
            )
        for function, needs in zip(self.functions, self._needs_columns, strict=True):
            missing = [name for name in needs if name not in columns]
            if missing:
                raise UserError(
                    f"reward {function.key!r} ({function.source}) needs {', '.join(missing)}: neither a column of the "
                    f"rows ({', '.join(sorted(columns)) or 'none'}) nor in its args"
                )
            twice = sorted(function.args.keys() & set(columns))
            if twice:
                raise UserError(f"reward {function.key!r}: args.{twice[0]} is also a column of the rows")

    def _load_errors(self, why: WorkerFailed) -> str:
        causes = why.args[0]
        if isinstance(causes, dict):
            return "\n".join(f"rewards[{i}] ({self.functions[i].source}): {cause}" for i, cause in causes.items())
        sources = ", ".join(function.source for function in self.functions)
        return f"rewards ({sources}): {causes}; if memory is short, raise scoring.memory_limit_gb or set it to null"


@dataclass(frozen=True)
class _Piece:
    """Some completions of a group, for one call of one function."""

    function: int
    group: int
    samples: tuple[int, ...]


class StepScoring:
    """A step's scoring: pieces of groups go out, answers come in, pieces that failed are split and go out again.

    ``add`` sends a group's pieces and returns at once; ``finish`` waits for the answers of all groups added since its
    last call and fills them in. How many may fail is counted over all of them. Errors are those of ``Scorer.score``.
    """

    def __init__(self, scorer: Scorer, step: int) -> None:
        self._scorer = scorer
        self._step = step
        self._groups: list[Group] = []
        self._done = 0  # groups that a call of finish has filled in
        self.answers: dict[tuple[int, int], list[tuple[_Piece, dict[str, Any]]]] = {}
        self._finished: queue.SimpleQueue[tuple[list[_Piece], Future[list[dict[str, Any]]]]] = queue.SimpleQueue()
        self._outstanding = 0
        self._failures: list[Counter[str]] = [Counter() for _ in scorer.names]
        self._first_failure = [""] * len(scorer.names)
        self._checked: set[tuple[str, ...]] = set()
        self._rows: list[bytes] = []
        self._samples: list[tuple[int, ...]] = []

    def add(self, group: Group) -> None:
        columns = tuple(sorted(group.prompt.columns))
        if columns not in self._checked:
            self._scorer.check_columns(columns)
            self._checked.add(columns)
        self._groups.append(group)
        self._rows.append(pickle.dumps((group.prompt.prompt, group.prompt.columns)))
        self._samples.append(tuple(i for i, c in enumerate(group.completions) if c.status is not Status.ERROR))
        index = len(self._groups) - 1
        for function, is_async in enumerate(self._scorer._is_async):
            self.answers[function, index] = []
            if not is_async:
                self._send(self._whole(function, [index]))

    def finish(self) -> None:
        new = range(self._done, len(self._groups))
        self._done = len(self._groups)
        for function, is_async in enumerate(self._scorer._is_async):
            if is_async:
                self._send(self._whole(function, new))
        while self._outstanding:
            pieces, future = self._finished.get()
            self._outstanding -= 1
            try:
                answers = future.result()
            except WorkerFailed as why:
                raise RunError(f"a scoring worker could not be started again: {why}") from None
            except CancelledError:
                raise RunError("scoring was closed while it was at work") from None
            self._receive(pieces, answers)
        for function in range(len(self._scorer.names)):
            if self._failures[function]:
                first = f". The first: {self._first_failure[function]}"
                told = self._scorer._told  # a traceback once a run, then a line a step
                logger.warning("%s%s", self._counted(function), "" if function in told else first)
                told.add(function)
        for index in new:
            answers_F = [self.answers[f, index] for f in range(len(self._scorer.names))]
            _fill(self._groups[index], self._scorer.names, self._scorer._weights, answers_F)

    @property
    def _total(self) -> int:
        return sum(map(len, self._samples))

    def _whole(self, function: int, groups: Iterable[int]) -> list[_Piece]:
        return [_Piece(function, g, self._samples[g]) for g in groups if self._samples[g]]

    def _send(self, pieces: list[_Piece], *, alone: bool = False) -> None:
        """Pieces of one function as jobs: one each, or, for an async function, one for all: it awaits them together."""
        if not pieces:
            return
        is_async = self._scorer._is_async[pieces[0].function]
        if len(pieces) > 1 and (alone or not is_async):
            for piece in pieces:
                self._send([piece])
            return
        function = pieces[0].function
        job = {"function": function, "step": self._step, "calls": [self._call(piece) for piece in pieces]}
        timeout = self._scorer.functions[function].timeout + (ASYNC_GRACE if is_async else 0)
        future = self._scorer._submit(job, timeout)
        self._outstanding += 1
        future.add_done_callback(lambda done: self._finished.put((pieces, done)))

    def _call(self, piece: _Piece) -> dict[str, Any]:
        prompt = self._groups[piece.group].prompt
        wants_ids = self._scorer._wants_ids[piece.function]
        completions = [self._groups[piece.group].completions[sample] for sample in piece.samples]
        texts: list[Any] = [completion.text for completion in completions]
        if not isinstance(prompt.prompt, str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        return {
            "row": self._rows[piece.group],
            "completions": texts,
            "completion_ids": [completion.token_ids for completion in completions] if wants_ids else None,
            "status": [completion.status.value for completion in completions],
            "prefill": prompt.prefill,
        }

    def _receive(self, pieces: list[_Piece], answers: list[dict[str, Any]]) -> None:
        lost = [piece for piece, answer in zip(pieces, answers, strict=True) if answer.get("lost")]
        if len(lost) > 1:  # calls of an async function that died together: find out which one it was
            self._send(lost, alone=True)
        for piece, answer in zip(pieces, answers, strict=True):
            if "broken" in answer:
                function = self._scorer.functions[piece.function]
                raise RunError(f"reward {function.key!r} ({function.source}) {answer['broken']}")
            if "failure" not in answer:
                self._accept(piece, answer)
            elif len(lost) <= 1 or not answer.get("lost"):
                self._split(piece, answer)

    def _accept(self, piece: _Piece, answer: dict[str, Any]) -> None:
        self.answers[piece.function, piece.group].append((piece, answer))
        for reward, (verdict, detail) in zip(answer["rewards"], answer["verdicts"] or (), strict=False):
            if reward is None and verdict in UNSCORABLE_VERDICTS:
                self._count(piece.function, verdict, 1, f"{verdict}: {detail}")
        for index, value in answer["not_finite"]:
            where = f"prompt {self._groups[piece.group].prompt.id}, completion {piece.samples[index]}"
            expected = "expected a finite number, or None where a completion cannot be scored"
            self._count(piece.function, "not_finite", 1, f"{where}: it returned {value}; {expected}")

    def _split(self, piece: _Piece, failure: dict[str, Any]) -> None:
        if len(piece.samples) > 1 and not self._scorer._needs_group[piece.function]:
            singles = [_Piece(piece.function, piece.group, (sample,)) for sample in piece.samples]
            self._send(singles, alone=bool(failure.get("lost")))
            return
        self.answers[piece.function, piece.group].append((piece, failure))
        prompt_id = self._groups[piece.group].prompt.id
        where = f"prompt {prompt_id}, completion {', '.join(map(str, piece.samples))}: {failure['message']}"
        self._count(piece.function, failure["failure"], len(piece.samples), where)

    def _count(self, function: int, cause: str, completions: int, message: str) -> None:
        self._failures[function][cause] += completions
        self._first_failure[function] = self._first_failure[function] or message.strip()
        if sum(self._failures[function].values()) > self._scorer._max_failure_rate * self._total:
            raise RunError(
                f"{self._counted(function)}, more than scoring.max_failure_rate = "
                f"{self._scorer._max_failure_rate:g} allows. The first: {self._first_failure[function]}"
            )

    def _counted(self, function: int) -> str:
        spec, causes = self._scorer.functions[function], self._failures[function]
        counts = ", ".join(f"{cause} {count}" for cause, count in causes.most_common())
        return (
            f"step {self._step}: reward {spec.key!r} ({spec.source}) could not score {sum(causes.values())} of "
            f"{self._total} completions ({counts})"
        )


def _fill(
    group: Group, names: list[str], weights: list[float], answers: list[list[tuple[_Piece, dict[str, Any]]]]
) -> None:
    """Put the answers of every function (names, weights and answers in the same order) into the group."""
    size = len(group.completions)
    group.rewards_by_function, group.verdicts, group.extra_metrics, group.extra_columns = {}, {}, {}, {}
    for name, pieces in zip(names, answers, strict=True):
        values: list[float | None] = [None] * size
        verdicts = Counter({"not_generated": sum(c.status is Status.ERROR for c in group.completions)})
        for piece, answer in sorted(pieces, key=lambda item: item[0].samples):  # not in the order of arrival
            if "failure" in answer:
                verdicts[answer["failure"]] += len(piece.samples)
                continue
            for sample, value in zip(piece.samples, answer["rewards"], strict=True):
                values[sample] = value
            not_finite = dict(answer["not_finite"])
            verdicts["not_finite"] += len(not_finite)
            if answer["verdicts"] is None:
                verdicts["unscored"] += answer["rewards"].count(None) - len(not_finite)
            else:
                verdicts.update(verdict for i, (verdict, _) in enumerate(answer["verdicts"]) if i not in not_finite)
            for metric, value in answer["metrics"]:
                group.extra_metrics.setdefault(metric, []).append(value)
            for column, entries in answer["columns"].items():
                cells = group.extra_columns.setdefault(column, [None] * size)
                for sample, entry in zip(piece.samples, entries, strict=True):
                    cells[sample] = entry
        group.rewards_by_function[name] = values
        group.verdicts[name] = dict(+verdicts)
    by_function = list(group.rewards_by_function.values())
    group.rewards = [_weighted(weights, [values[g] for values in by_function]) for g in range(size)]


def _weighted(weights: list[float], values: list[float | None]) -> float | None:
    scored = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(scored) if scored else None
