"""A step's scoring: calls go out while groups are still sampled, outcomes come in, calls that failed are split.

When a call fails, its completions are scored again one by one, so that one bad completion costs one; a function that
needs its whole group loses the group. (One by one, not by halves: every call that holds a hanging completion costs a
whole timeout, and halving makes log2(G) + 1 of them.)
"""

from __future__ import annotations

import logging
import math
import pickle
import queue
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

from grpo.errors import RunError, UserError
from grpo.scoring.call import FunctionSpec
from grpo.scoring.episodes import messages_of, paid, unpaid
from grpo.scoring.failures import Failures
from grpo.scoring.messages import Answer, BrokenContract, Failure, Job, Outcome, Request, Signature
from grpo.scoring.pool import Pool
from grpo.scoring.process import WorkerFailed
from grpo.types import REWARD_KEYWORDS, Group, Status

logger = logging.getLogger(__name__)

NOTHING = Signature(is_async=False, wants_ids=False, needs=[])
UNPAID = -1  # among what a run was told
ASYNC_GRACE = 1.0  # seconds in which a worker gives up by itself on an async call that is late
UNSCORABLE_VERDICTS = frozenset({"gold_unparseable", "error"})  # a function's own word for "not the completion's fault"


@dataclass(frozen=True)
class ScoredFunction:
    """A reward function of the recipe: where it is, what it asks for, and how it counts."""

    spec: FunctionSpec
    signature: Signature
    weight: float
    needs_group: bool
    scores: Callable[[str], bool] = lambda source: True
    """Whether it scores completions of a source of `data.mix`."""
    place: int | None = None
    """Its place among the functions of the pool; None for what an environment paid."""

    def __str__(self) -> str:
        return f"reward {self.spec.key!r} ({self.spec.source})"


@dataclass(frozen=True)
class _Piece:
    """Some completions of a group, for one call of one function."""

    function: int
    group: int
    samples: tuple[int, ...]


class StepScoring:
    """``add`` sends the calls of a group and returns at once. ``finish`` waits for the outcomes of all groups that were
    added since its last call, and fills them in. How many completions may fail is counted over the whole step.

    ``told`` holds what a run has shown a first failure of already, the functions by their places (and ``UNPAID``); with
    None nothing is shown. Failed episodes are counted as a function's failures are.

    Those in ``left_out`` are not called. Errors are those of ``Scorer.score``.
    """

    def __init__(
        self,
        functions: Sequence[ScoredFunction],
        pool: Pool,
        step: int,
        max_failure_rate: float,
        told: set[int] | None,
        left_out: Collection[int] = (),
    ) -> None:
        self._called = [place for place, of in enumerate(functions) if of.place is not None and place not in left_out]
        self._functions = functions
        self._pool = pool
        self._step = step
        who = [f"{function} could not score" for function in functions]
        self._failures = Failures([*who, "the environment failed in"], step, max_failure_rate)
        self._told = told
        self._groups: list[Group] = []
        self._rows: list[bytes] = []  # of each group: its pickled prompt and columns
        self._samples: list[tuple[int, ...]] = []  # of each group: the completions that were generated
        self._results: dict[tuple[int, int], list[tuple[_Piece, Answer | Failure]]] = {}  # by function and group
        self._filled = 0  # groups that a call of finish has filled in
        self._checked: set[tuple[str, tuple[str, ...]]] = set()
        self._finished: queue.SimpleQueue[tuple[list[_Piece], Future[list[Outcome]]]] = queue.SimpleQueue()
        self._outstanding = 0

    def add(self, group: Group) -> None:
        source, columns = group.prompt.source, tuple(sorted(group.prompt.columns))
        if (source, columns) not in self._checked:
            check_columns(self._functions, columns, source)
            self._checked.add((source, columns))
        self._groups.append(group)
        self._rows.append(pickle.dumps((group.prompt.prompt, group.prompt.columns)))
        self._samples.append(tuple(i for i, c in enumerate(group.completions) if c.status is not Status.ERROR))
        index = len(self._groups) - 1
        for place, function in enumerate(self._functions):
            self._results[place, index] = []
            if function.scores(source):
                self._failures.completions[place] += len(self._samples[-1])
            if not function.signature.is_async and place in self._called:
                self._send(self._whole(place, [index]))
        self._failures.completions[-1] += sum(c.episode is not None for c in group.completions)

    def finish(self) -> None:
        new = range(self._filled, len(self._groups))
        self._filled = len(self._groups)
        for place in self._called:
            if self._functions[place].signature.is_async:
                self._send(self._whole(place, new))
        for index in new:
            self._count_failed_episodes(self._groups[index])
        while self._outstanding:
            pieces, future = self._finished.get()
            self._outstanding -= 1
            try:
                outcomes = future.result()
            except WorkerFailed as why:
                raise RunError(f"a scoring worker could not be started again: {why}") from None
            except CancelledError:
                raise RunError("scoring was closed while it was at work") from None
            self._receive(pieces, outcomes)
        if self._told is not None:
            self._failures.warn(self._told)
            self._warn_of_no_pay(self._told)
        for index in new:
            results_F = [self._results[place, index] for place in range(len(self._functions))]
            _fill(self._groups[index], self._functions, results_F)

    def _warn_of_no_pay(self, told: set[int]) -> None:
        pays = any(function.place is None for function in self._functions)
        if pays and UNPAID not in told and (why := unpaid(self._groups)):
            logger.warning("step %d: %s", self._step, why)
            told.add(UNPAID)

    def _count_failed_episodes(self, group: Group) -> None:
        for sample, completion in enumerate(group.completions):
            said = paid(completion)
            if said.failed:
                where = f"prompt {group.prompt.id}, completion {sample}: {said.message}"
                self._failures.add(len(self._functions), said.said, 1, where)

    def _whole(self, function: int, groups: Iterable[int]) -> list[_Piece]:
        scores = self._functions[function].scores
        scored = (g for g in groups if self._samples[g] and scores(self._groups[g].prompt.source))
        return [_Piece(function, g, self._samples[g]) for g in scored]

    def _send(self, pieces: list[_Piece]) -> None:
        """Send pieces of one function: in a job each, or, where it is async, in one job, which awaits them together."""
        if pieces and self._functions[pieces[0].function].signature.is_async:
            self._submit(pieces)
        else:
            self._send_alone(pieces)

    def _send_alone(self, pieces: list[_Piece]) -> None:
        for piece in pieces:
            self._submit([piece])

    def _submit(self, pieces: list[_Piece]) -> None:
        place = pieces[0].function
        function = self._functions[place]
        timeout = function.spec.timeout + (ASYNC_GRACE if function.signature.is_async else 0)
        assert function.place is not None, "what an environment paid is not asked for"
        job = Job(function.place, self._step, [self._request(piece) for piece in pieces])
        future = self._pool.submit(job, timeout)
        self._outstanding += 1
        future.add_done_callback(lambda done: self._finished.put((pieces, done)))

    def _request(self, piece: _Piece) -> Request:
        """What a function is told of completions. Of episodes, one of ours judges what the model wrote, and its tokens;
        one of the user's gets what TRL gives it: all tokens and, for chat prompts, the messages of both sides."""
        prompt, function = self._groups[piece.group].prompt, self._functions[piece.function]
        completions = [self._groups[piece.group].completions[sample] for sample in piece.samples]
        texts: list[Any] = [completion.text for completion in completions]
        if not isinstance(prompt.prompt, str) and function.spec.builtin:
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        elif not isinstance(prompt.prompt, str):
            texts = [messages_of(completion) for completion in completions]
        ids = [c.model_token_ids() if function.spec.builtin else list(c.token_ids) for c in completions]
        return Request(
            row=self._rows[piece.group],
            completions=texts,
            completion_ids=ids if function.signature.wants_ids else None,
            status=[completion.status.value for completion in completions],
            prefill=prompt.prefill,
        )

    def _receive(self, pieces: list[_Piece], outcomes: list[Outcome]) -> None:
        """Take in the outcomes of a job. Calls that were lost together go out alone, to find the one at fault."""
        pairs = list(zip(pieces, outcomes, strict=True))
        lost = [piece for piece, outcome in pairs if isinstance(outcome, Failure) and outcome.lost]
        if len(lost) > 1:
            self._send_alone(lost)
            pairs = [(piece, outcome) for piece, outcome in pairs if piece not in lost]
        for piece, outcome in pairs:
            if isinstance(outcome, BrokenContract):
                raise RunError(f"{self._functions[piece.function]} {outcome.message}")
            if isinstance(outcome, Answer):
                self._accept(piece, outcome)
            else:
                self._split(piece, outcome)

    def _accept(self, piece: _Piece, answer: Answer) -> None:
        self._results[piece.function, piece.group].append((piece, answer))
        for reward, verdict, detail in zip(answer.rewards, answer.verdicts, answer.details, strict=False):
            if reward is None and verdict in UNSCORABLE_VERDICTS:
                self._failures.add(piece.function, verdict, 1, f"{verdict}: {detail}")
        for index, value in answer.not_finite.items():
            where = f"prompt {self._groups[piece.group].prompt.id}, completion {piece.samples[index]}"
            expected = "expected a finite number, or None where a completion cannot be scored"
            self._failures.add(piece.function, "not_finite", 1, f"{where}: it returned {value}; {expected}")

    def _split(self, piece: _Piece, failure: Failure) -> None:
        if len(piece.samples) > 1 and not self._functions[piece.function].needs_group:
            singles = [_Piece(piece.function, piece.group, (sample,)) for sample in piece.samples]
            if failure.lost:
                self._send_alone(singles)
            else:
                self._send(singles)
            return
        self._results[piece.function, piece.group].append((piece, failure))
        prompt_id = self._groups[piece.group].prompt.id
        where = f"prompt {prompt_id}, completion {', '.join(map(str, piece.samples))}: {failure.message}"
        self._failures.add(piece.function, failure.cause, len(piece.samples), where)


def check_columns(functions: Sequence[ScoredFunction], columns: Collection[str], source: str = "") -> None:
    """Raise UserError where a function needs a column that rows of a source with these do not have, or where names
    clash."""
    of_source = f" of {source}" if source else ""
    taken = sorted(REWARD_KEYWORDS.intersection(columns))
    if taken:
        raise UserError(
            f"data: the rows{of_source} have a column {taken[0]!r}, a name under which reward functions get something "
            "else from the trainer; rename or drop the column"
        )
    for function in functions:
        if not function.scores(source):
            continue
        missing = [name for name in function.signature.needs if name not in columns]
        if missing:
            raise UserError(
                f"{function} needs {', '.join(missing)}: neither a column of the "
                f"rows{of_source} ({', '.join(sorted(columns)) or 'none'}) nor in its args"
            )
        twice = sorted(function.spec.args.keys() & set(columns))
        if twice:
            raise UserError(f"reward {function.spec.key!r}: args.{twice[0]} is also a column of the rows{of_source}")


def _fill(
    group: Group, functions: Sequence[ScoredFunction], results: Sequence[list[tuple[_Piece, Answer | Failure]]]
) -> None:
    """Put the results of every function into the group."""
    size = len(group.completions)
    not_generated = sum(completion.status is Status.ERROR for completion in group.completions)
    group.rewards_by_function, group.verdicts, group.said = {}, {}, {}
    group.extra_metrics, group.extra_columns = {}, {}
    for function, pieces in zip(functions, results, strict=True):
        values: list[float | None] = [None] * size
        scores = function.scores(group.prompt.source)
        if function.place is None and scores:
            _fill_paid(group, function.spec.key)
            continue
        said = ["not_generated" if scores else "not_asked"] * size
        verdicts = Counter({"not_generated": not_generated * scores})
        for piece, result in sorted(pieces, key=lambda pair: pair[0].samples):  # not in the order of arrival
            if isinstance(result, Failure):
                verdicts[result.cause] += len(piece.samples)
                for sample in piece.samples:
                    said[sample] = result.cause
                continue
            for sample, reward, reason in zip(piece.samples, result.rewards, _said(result), strict=True):
                values[sample] = reward if reward is not None and math.isfinite(reward) else None
                said[sample] = reason
            verdicts.update(_verdicts(result))
            for metric, logged in result.metrics.items():
                name = f"rewards/{function.spec.key}/logged/{metric}"  # no name of the trainer's begins so
                group.extra_metrics.setdefault(name, []).extend(logged)
            for column, entries in result.columns.items():
                cells = group.extra_columns.setdefault(column, [None] * size)
                for sample, entry in zip(piece.samples, entries, strict=True):
                    cells[sample] = entry
        group.rewards_by_function[function.spec.key] = values
        group.verdicts[function.spec.key], group.said[function.spec.key] = dict(+verdicts), said
    weights = [function.weight for function in functions]
    by_function = list(group.rewards_by_function.values())
    group.rewards = [_weighted(weights, [values[g] for values in by_function]) for g in range(size)]


def _fill_paid(group: Group, name: str) -> None:
    """Put what the environment paid into the group."""
    found = [paid(completion) for completion in group.completions]
    group.rewards_by_function[name] = [one.reward for one in found]
    group.said[name] = [one.said for one in found]
    group.verdicts[name] = dict(Counter(one.said for one in found))


def _said(answer: Answer) -> list[str]:
    """The verdict on each completion of a call, or in a word whether there is a reward."""
    not_finite = answer.not_finite
    verdicts = answer.verdicts or ["unscored" if reward is None else "scored" for reward in answer.rewards]
    return ["not_finite" if i in not_finite else verdict for i, verdict in enumerate(verdicts)]


def _verdicts(answer: Answer) -> Counter[str]:
    """How many completions of a call got which verdict. What a function leaves unsaid is counted where it is None."""
    not_finite = answer.not_finite
    if answer.verdicts:
        counted = Counter(verdict for i, verdict in enumerate(answer.verdicts) if i not in not_finite)
    else:
        counted = Counter({"unscored": answer.rewards.count(None)})
    counted["not_finite"] += len(not_finite)
    return counted


def _weighted(weights: list[float], values: list[float | None]) -> float | None:
    scored = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return sum(scored) if scored else None
