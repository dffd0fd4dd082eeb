"""What the trainer and a scoring worker say to each other. Standard library only.

A worker gets pickled ``Job``s. It answers in JSON, which ``encode`` writes and ``decode`` reads: a reward function runs
in the worker, so the trainer never unpickles anything that comes from there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Request:
    """One call of a function: completions of one group, and what the function is told about them."""

    row: bytes  # the pickled pair of the prompt and its columns; all requests of a group share it
    completions: list[Any]  # texts, or lists of messages where the prompt is one
    completion_ids: list[list[int]] | None  # None where the function does not ask for them
    status: list[str]
    prefill: str


@dataclass(frozen=True)
class Job:
    """Calls of one function (by its place in the recipe) that a worker makes in one go."""

    function: int
    step: int
    requests: list[Request]


@dataclass(frozen=True)
class Signature:
    """What a loaded function asks for. ``needs`` are the columns without which it cannot be called."""

    is_async: bool
    wants_ids: bool
    needs: list[str]


@dataclass(frozen=True)
class Ready:
    """A worker has loaded all functions."""

    signatures: list[Signature]


@dataclass(frozen=True)
class NotLoaded:
    """A worker could not load some functions: the cause of each, None where it was loaded."""

    causes: list[str | None]


@dataclass(frozen=True)
class Answer:
    """What a call returned and logged. ``rewards`` has one entry per completion; an entry may be infinite or NaN.

    ``verdicts`` and ``details`` say why each completion got its reward; both are empty where the function does not say.
    ``metrics`` holds every value that was logged under a name, ``columns`` one entry per completion.
    """

    rewards: list[float | None]
    verdicts: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def not_finite(self) -> dict[int, float]:
        """The rewards that are no number to train on, by their place."""
        return {i: reward for i, reward in enumerate(self.rewards) if reward is not None and not math.isfinite(reward)}


@dataclass(frozen=True)
class Failure:
    """A call that gave no rewards. ``cause`` is ``error``, ``timeout`` or ``crashed``; ``message`` tells where and why.

    ``lost``: the worker ended before it answered this call; another call of the same job may be at fault.
    ``restart``: the worker is not fit for another call.
    """

    cause: str
    message: str
    lost: bool = False
    restart: bool = False


@dataclass(frozen=True)
class BrokenContract:
    """The function returned or logged what no reward function may: a bug in it, which ends the run."""

    message: str


Outcome: TypeAlias = "Answer | Failure | BrokenContract"
Message: TypeAlias = "Ready | NotLoaded | Outcome"
KINDS: dict[str, type] = {kind.__name__: kind for kind in (Ready, NotLoaded, Answer, Failure, BrokenContract)}


class Garbled(ValueError):
    """Bytes from a worker that are no message."""


def encode(message: Message, call: int = 0) -> bytes:
    """A worker's message, or its outcome of the job's request number ``call``."""
    return json.dumps([call, type(message).__name__, message], default=vars).encode()


def decode(data: bytes) -> tuple[int, Message]:
    """The number of the request, and the message. Raises Garbled where ``encode`` did not write the bytes."""
    try:
        call, kind, fields = json.loads(data)
        if kind == Ready.__name__:
            return call, Ready([Signature(**signature) for signature in fields["signatures"]])
        return call, KINDS[kind](**fields)
    except (ValueError, TypeError, KeyError, RecursionError) as why:
        raise Garbled(f"the worker sent {data[:60]!r}, which is no message") from why
