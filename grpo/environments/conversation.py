"""One episode: its turns, what its environment makes of them, and how it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, replace
from typing import Any

from grpo.environments.calls import Call, Refused, Schemas, find_calls
from grpo.environments.living import EpisodeFailed
from grpo.environments.observations import Observations
from grpo.environments.process import error_text
from grpo.environments.worlds import World
from grpo.types import Completion, Episode, Status, ToolCall, Turn, VersionSpan

log = logging.getLogger(__name__)

Reply = Future["list[int] | None"]


@dataclass(frozen=True)
class Rules:
    """What holds for all episodes of an environment. ``text_of`` decodes the model's tokens."""

    game: bool
    form: str
    tools: Schemas
    max_turns: int
    text_of: Callable[[Sequence[int]], str]


@dataclass
class _Taken:
    """A turn that the model has taken. ``open``: it asked for an answer. What follows it comes later."""

    start: int
    end: int
    ended: str
    text: str
    open: bool
    calls: tuple[ToolCall, ...] = ()
    reward: float | None = None
    observation: str = ""
    cut: bool = False


class Conversation:
    """An episode under way. ``world`` makes its process; ``row`` is what ``reset`` gets.

    ``said`` gives what ``reset`` said, and never raises. ``over`` ends when all is known of the episode, its reward
    included.
    """

    def __init__(self, rules: Rules, row: dict[str, Any], world: Callable[[], World]) -> None:
        self.rules, self.row, self._new_world = rules, row, world
        self.observations: Observations | None = None  # of the prompt that it was given
        self.turns: list[_Taken] = []
        self.failure: EpisodeFailed | None = None
        self.reward: float | None = None
        self.done = False  # the environment has ended it
        self.cut_off = False  # the episode's tokens were used up
        self._finished = False  # its reward has been asked for
        self.said: Future[str | None] = Future()
        self.over: Future[None] = Future()
        self._begin(self.said.set_result)

    def _begin(self, then: Callable[[str | None], None]) -> None:
        self.world = self._new_world()

        def has_reset(future: Future[Any]) -> None:
            said = self._result(future)
            then(said if isinstance(said, str) else None)

        self.world.ask("reset", self.row).add_done_callback(has_reset)

    def fail(self, cause: str, message: str) -> None:
        """It cannot be played."""
        self._fail(EpisodeFailed(cause, message))

    def close(self) -> None:
        self.world.close()

    # --- turns

    def answer(self, token_ids: Sequence[int], start: int, ended: str, last: bool) -> Reply:
        """See ``Turns.answer``."""
        reply: Reply = Future()
        if start == 0 and self.turns:  # the backend had to begin again: so does the environment, with the same draws
            self.close()
            self.turns, self.done, self._finished = [], False, False
            self._begin(lambda _: None)
        own = token_ids[start:]
        turn = _Taken(start, start + len(own), ended, self.rules.text_of(own), open=True)
        self.turns.append(turn)
        self.cut_off = last
        final = last or len(self.turns) >= self.rules.max_turns
        last_token = own[-1] if own else -1
        if self.failure is not None:
            reply.set_result(None)
        elif self.rules.game:
            self._step(turn, reply, last_token, final)
        else:
            self._call(turn, reply, last_token, final)
        return reply

    def _step(self, turn: _Taken, reply: Reply, last_token: int, final: bool) -> None:
        def stepped(future: Future[Any]) -> None:
            said = self._result(future)
            if said is not None:
                turn.reward, turn.observation, self.done = said["reward"], said["observation"], said["done"]
            if final:
                return
            if self.done or said is None:
                self._end(reply)
            else:
                assert self.observations is not None
                tokens, turn.cut = self.observations.of_text(turn.observation, last_token)
                reply.set_result(tokens)

        self.world.ask("step", turn.text).add_done_callback(self._guarded(stepped, reply))
        if final:
            self._end(reply)

    def _call(self, turn: _Taken, reply: Reply, last_token: int, final: bool) -> None:
        assert self.observations is not None
        most = self.observations.most_results
        found = find_calls(self.rules.form, turn.text, self.rules.tools)
        turn.open = bool(found)
        if not found:
            self._end(reply)
            return
        if turn.ended == "stop":
            turn.ended = "tool_call"

        def called(future: Future[Any]) -> None:
            lost = future.exception() is not None
            turn.calls = _calls(found, None if lost else future.result(), most)  # before anybody hears that it is over
            results = self._result(future)
            if final:
                return
            if results is None:
                self._end(reply)
            else:
                told = [(call.name or "unknown", call.result) for call in turn.calls[:most]]
                assert self.observations is not None
                tokens, turn.cut = self.observations.of_results(told, last_token)
                reply.set_result(tokens)

        made = [(call.name, call.arguments) for call in found[:most] if isinstance(call, Call)]
        asked: Future[Any]
        if made:
            asked = self.world.ask("call", made)
        else:  # there is nothing to wait for
            asked = Future()
            asked.set_result([])
        asked.add_done_callback(self._guarded(called, reply))
        if final:
            self._end(reply)

    def _guarded(self, then: Callable[[Future[Any]], None], reply: Reply) -> Callable[[Future[Any]], None]:
        """What is to be done with an answer. Where it cannot be, the episode fails, and who waits for ``reply`` goes
        on."""

        def guarded(future: Future[Any]) -> None:
            try:
                then(future)
            except Exception as why:
                log.exception("environment: an answer could not be used")
                self.fail("error", f"its answer could not be used: {type(why).__name__}: {why}")
                if not reply.done():
                    reply.set_result(None)

        return guarded

    def _end(self, reply: Reply) -> None:
        """No turn follows. The reward is asked for at once, so that nobody waits for it later."""
        self._finish()
        reply.set_result(None)

    def _finish(self) -> None:
        if not self._finished and self.failure is None:
            self._finished = True
            self.world.ask("get_reward").add_done_callback(self._rewarded)

    def ended_by_backend(self, gave_up: bool) -> None:
        """The backend asks for no more turns of it: it ``gave_up``, or takes it to be over."""
        if not gave_up:
            self._finish()
        else:
            self._is_over()

    def _rewarded(self, future: Future[Any]) -> None:
        self.reward = self._result(future)
        self._is_over()

    def _is_over(self) -> None:
        self.close()
        with contextlib.suppress(InvalidStateError):  # it was over before, perhaps by another thread
            self.over.set_result(None)

    def _result(self, future: Future[Any]) -> Any:
        """What a call gave; None where it failed, and the episode with it."""
        why = future.exception()
        if isinstance(why, EpisodeFailed):
            self._fail(why)
            return None
        return future.result()

    def _fail(self, why: EpisodeFailed) -> None:
        self.failure = self.failure or why
        self._is_over()

    # --- afterwards

    def completion(self, sampled: Completion | None, opening: Sequence[int], opening_text: str) -> Completion:
        """The episode as a completion: what the backend sampled, behind the ``opening`` that is the environment's."""
        lead = len(opening)
        length = 0 if sampled is None else len(sampled.token_ids)
        turns = [
            Turn(t.start + lead, t.end + lead, t.ended, t.reward, t.calls, t.text, t.observation, t.cut)
            for t in self.turns
            if t.end <= length
        ]
        failure = ("", "") if self.failure is None else (self.failure.cause, str(self.failure))
        lost = self.failure is not None or sampled is None or sampled.status is Status.ERROR
        reward = None if lost else self.reward
        episode = Episode(turns, reward, *failure, opening=opening_text)
        text = "\n".join(turn.text for turn in turns)
        if sampled is None:
            return Completion([], [], Status.ERROR, "", [], episode)
        versions = [VersionSpan(v.start + lead if v.start else 0, v.end + lead, v.version) for v in sampled.versions]
        return Completion(
            [*opening, *sampled.token_ids],
            [*([0.0] * lead), *sampled.sampler_logprobs],
            self._status(sampled.status),
            text,
            versions,
            episode,
        )

    def _status(self, sampled: Status) -> Status:
        if self.failure is not None or sampled is Status.ERROR or not self.turns:
            return Status.ERROR
        if self.done:
            return Status.ENVIRONMENT
        turn = self.turns[-1]
        if turn.ended == "length" and not turn.open:
            return Status.LENGTH
        if not turn.open:
            return Status.STOP
        return Status.LENGTH if self.cut_off else Status.TURNS


def _calls(
    found: Sequence[Call | Refused], results: Sequence[tuple[str, str]] | None, most: int
) -> tuple[ToolCall, ...]:
    """The calls of a turn with what came of them; ``results`` None where the episode was lost with them. Calls beyond
    ``most`` were not made, and the last answer says so."""
    given = iter(results or [])
    calls = []
    for call in found[:most]:
        if isinstance(call, Refused):
            calls.append(ToolCall(call.name, call.text, error_text(call.message), call.kind))
        else:
            text, error = next(given, ("", "lost"))
            calls.append(ToolCall(call.name, call.text, text, error))
    if left := found[most:]:
        why = error_text(f"{len(left)} more calls of this turn were not made: at most {most} are answered at once")
        calls[-1] = replace(calls[-1], result=f"{calls[-1].result}\n{why}")
        calls += [ToolCall(call.name, call.text, "", "too_many") for call in left]
    return tuple(calls)
