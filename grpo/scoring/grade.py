"""Completions that are there already, judged by one reward outside of any run: `grpo score`.

Each is scored alone, in the processes in which a run scores, so one that makes a function hang or crash costs itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from grpo.config import RewardConfig, ScoringConfig
from grpo.errors import UserError
from grpo.scoring.call import FunctionSpec
from grpo.scoring.functions import locate, needs_ids, start_own_workers
from grpo.scoring.messages import Answer, BrokenContract, Job, Outcome, Request, Signature
from grpo.scoring.pool import Pool
from grpo.types import REWARD_KEYWORDS, Status

AT_ONCE = 64  # completions a worker that are under way
STATUSES = frozenset(status.value for status in Status)


@dataclass(frozen=True)
class Graded:
    """What a reward says of a completion. ``verdict`` is its own word, or why there is none: ``error``, ``timeout``,
    ``crashed``, ``not_finite``; for a function that gives no verdicts ``scored`` or ``unscored``."""

    reward: float | None
    verdict: str
    detail: str = ""


@dataclass(frozen=True)
class Completion:
    """A completion with the columns of its row: a text or messages, the row's prompt, and how it ended."""

    text: str | list[dict[str, Any]]
    prompt: Any = ""
    columns: dict[str, Any] = field(default_factory=dict)
    status: str = "stop"
    prefill: str = ""
    token_ids: list[int] | None = None


class Grader:
    """A reward in its processes. Close it, or use ``grader``.

    Raises:
        UserError: there is no such reward, it cannot be loaded, or does not take these arguments.
    """

    def __init__(self, reward: RewardConfig, workers: int) -> None:
        scoring = ScoringConfig(workers=workers)
        self._specs = locate([reward], scoring)
        if self.spec.is_paid:
            raise UserError(
                "reward 'environment' is what an environment pays for an episode while it is played; there is none for "
                "a text that is there already. Name the function that judges it"
            )
        self._own = start_own_workers(self._specs, workers)
        try:
            self._pool = Pool(self._specs, scoring, 0, run_here=self._own)
        except BaseException:
            self._stop()
            raise
        self._at_once = AT_ONCE * workers
        self._needs_ids = self.spec.builtin and needs_ids(self.spec)

    @property
    def spec(self) -> FunctionSpec:
        return self._specs[0]

    @property
    def signature(self) -> Signature:
        return self._pool.signatures[0]

    def problem_of(self, completion: Completion) -> str | None:
        """Why a row cannot be handed to the reward, or None."""
        if missing := [name for name in self.signature.needs if name not in completion.columns]:
            there = ", ".join(map(repr, completion.columns)) or "none"
            return f"reward {self.spec.key!r} needs the column {missing[0]!r} (others here: {there})"
        if self._needs_ids and completion.token_ids is None:
            return f"reward {self.spec.key!r} counts tokens: it needs the column 'completion_ids', a list of numbers"
        if completion.status not in STATUSES:
            return f"status is {completion.status!r}, not one of {', '.join(sorted(STATUSES))}"
        if twice := sorted(self.spec.args.keys() & completion.columns.keys()):
            return f"the argument {twice[0]} is also a column"
        return None

    def grade(self, completions: Iterable[Completion]) -> Iterator[Graded]:
        """The verdicts, in order. Raises UserError where the function breaks its contract."""
        waiting = iter(completions)
        while batch := list(islice(waiting, self._at_once)):
            futures = [self._pool.submit(Job(0, 0, [_request(one)]), self.spec.timeout) for one in batch]
            for future in futures:
                yield self._graded(future.result()[0])

    def _graded(self, outcome: Outcome) -> Graded:
        if isinstance(outcome, BrokenContract):
            raise UserError(f"reward {self.spec.key!r} ({self.spec.source}) {outcome.message}")
        if not isinstance(outcome, Answer):
            return Graded(None, outcome.cause, outcome.message.strip())
        if outcome.not_finite:
            return Graded(None, "not_finite", f"it returned {outcome.rewards[0]}")
        said = outcome.verdicts[0] if outcome.verdicts else "unscored" if outcome.rewards[0] is None else "scored"
        return Graded(outcome.rewards[0], said, outcome.details[0] if outcome.details else "")

    def close(self) -> None:
        self._stop()
        self._pool.close()

    def _stop(self) -> None:
        for module in self._own.values():
            module.stop()


@contextmanager
def grader(reward: RewardConfig, workers: int) -> Iterator[Grader]:
    """A Grader that is closed at the end of the block."""
    opened = Grader(reward, workers)
    try:
        yield opened
    finally:
        opened.close()


def _request(one: Completion) -> Request:
    columns = {name: value for name, value in one.columns.items() if name not in REWARD_KEYWORDS}
    ids = None if one.token_ids is None else [one.token_ids]
    return Request(pickle.dumps((one.prompt, columns)), [one.text], ids, [one.status], one.prefill)
