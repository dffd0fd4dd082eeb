"""What a verifier says about one completion: an outcome, a reward that follows from it, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Outcome(str, Enum):
    """What happened. ``gold_unparseable`` and ``error`` mean "not scored": their reward is None, never 0."""

    CORRECT = "correct"
    WRONG = "wrong"  # an answer was read, and it is not right
    NO_ANSWER = "no_answer"  # not exactly one answer where answers are looked for
    UNPARSEABLE = "unparseable"  # an answer, but not in the grammar that is allowed
    TRUNCATED = "truncated"  # max_completion_length came first
    TIMEOUT = "timeout"  # the answer (a program, a huge expression) took too long
    LIMIT = "limit"  # a program wanted more memory, stack or output than it may have
    DENIED = "denied"  # a program reached for something it may not have: files, network, processes
    NO_RESULT = "no_result"  # a program ended, or said nonsense, before it had answered
    GOLD_UNPARSEABLE = "gold_unparseable"  # the row's own columns are broken: nobody could be right
    ERROR = "error"  # the completion was never finished, or the verifier broke


UNSCORABLE = frozenset({Outcome.GOLD_UNPARSEABLE, Outcome.ERROR})


@dataclass(frozen=True)
class Verdict:
    """``score`` is for graded rewards; without it ``correct`` is worth 1 and every other outcome 0."""

    outcome: Outcome
    detail: str = ""
    score: float | None = None

    @property
    def reward(self) -> float | None:
        """The number to learn from; None where the completion could not be scored."""
        if self.outcome in UNSCORABLE:
            return None
        if self.score is not None:
            return self.score
        return float(self.outcome is Outcome.CORRECT)


def rewards_of(
    verdicts: list[Verdict], log_verdict: Callable[[list[Verdict]], Any] | None = None
) -> list[float | None]:
    """The rewards, in order; tells the trainer the reasons if it listens (its ``log_verdict`` keyword)."""
    if log_verdict is not None:
        log_verdict(verdicts)
    return [verdict.reward for verdict in verdicts]
