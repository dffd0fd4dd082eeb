"""A test double of ``Turns``: it answers by a rule, at once or after a while. Real environments have tests of their
own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple


class Asked(NamedTuple):
    """One call of ``answer``: all tokens so far, where the turn began, and what came back."""

    place: tuple[int, int]
    tokens: list[int]
    start: int
    ended: str
    last: bool
    reply: list[int] | None


def by_place(place: tuple[int, int], turn: int) -> list[int] | None:
    """Three or four turns. Answers have 0 to 6 tokens; the rows of a group get different ones."""
    request, sample = place
    if turn == 2 + (request + sample) % 2:
        return None
    return [11 + (17 * request + 5 * sample + 3 * turn + 7 * i) % 70 for i in range((2 * request + sample + turn) % 7)]


@dataclass
class Answering:
    """``reply(place, turn)`` is the rule; None ends the episode. ``seconds`` pass until an answer is there."""

    reply: Callable[[tuple[int, int], int], list[int] | None] = by_place
    stop: Sequence[str] = ()
    max_turn_length: int | None = None
    max_environment_tokens: int = 24
    overlap_steps: int = 2
    seconds: float = 0.0
    asked: list[Asked] = field(default_factory=list)

    def answer(
        self, place: tuple[int, int], token_ids: Sequence[int], start: int, ended: str, *, last: bool
    ) -> Future[list[int] | None]:
        turn = sum(call.place == place for call in self.asked)
        reply = None if last else self.reply(place, turn)
        self.asked.append(Asked(place, list(token_ids), start, ended, last, reply))
        future: Future[list[int] | None] = Future()
        if self.seconds:
            threading.Timer(self.seconds, future.set_result, [reply]).start()
        else:
            future.set_result(reply)
        return future

    def of(self, place: tuple[int, int]) -> list[Asked]:
        """The calls for one episode, turn by turn."""
        return [call for call in self.asked if call.place == place]
