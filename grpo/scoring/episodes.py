"""What rewards are told of an episode: what its environment paid, and its turns as messages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from grpo.types import Completion, Group, Status, ToolCall, Turn


class Paid(NamedTuple):
    """What an environment paid for a completion, and in a word why not; ``message`` only where it failed."""

    reward: float | None
    said: str
    message: str = ""

    @property
    def failed(self) -> bool:
        """Is the environment at fault?"""
        return self.said not in ("scored", "unscored", "not_generated")


def paid(completion: Completion) -> Paid:
    """``said`` is ``scored``, ``unscored`` where the environment pays nothing, ``not_generated`` where a backend gave
    up, ``not_finite``, or the cause of the environment's failure."""
    episode = completion.episode
    if episode is not None and episode.failure:
        return Paid(None, episode.failure, episode.message)
    if episode is None or completion.status is Status.ERROR:
        return Paid(None, "not_generated")
    reward = episode.total_reward()
    if reward is None:
        return Paid(None, "unscored")
    if not math.isfinite(reward):
        return Paid(None, "not_finite", f"the environment paid {reward}; expected a finite number, or None")
    return Paid(reward, "scored")


def unpaid(groups: Sequence[Group]) -> str:
    """What there is to say where the environment has paid nothing for any completion; else empty."""
    found = [paid(completion) for group in groups for completion in group.completions if completion.episode]
    played = [one for one in found if one.said in ("scored", "unscored")]
    if not played or any(one.said == "scored" for one in played):
        return ""
    return (
        f"the environment paid nothing, not even 0, for any of {len(played)} completions: its get_reward returned "
        "None, or a game has no get_reward and its step returned (observation, done) without a reward"
    )


def messages_of(completion: Completion) -> list[dict[str, Any]]:
    """The completion as messages, in the form of TRL's: what the model wrote is an ``assistant``'s, with the calls that
    were made of it as ``tool_calls``; a call's result is a ``tool``'s, what an environment without tools says a
    ``user``'s. What followed the last turn the model has not read, so it is not there."""
    if completion.episode is None:
        return [{"role": "assistant", "content": completion.text}]
    messages: list[dict[str, Any]] = []
    for turn in completion.episode.turns:
        messages += [_said(turn), *_answered(turn)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def _said(turn: Turn) -> dict[str, Any]:
    calls = [_as_call(call) for call in turn.calls if call.name]
    return {"role": "assistant", "content": turn.text} | ({"tool_calls": calls} if calls else {})


def _as_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = call.arguments
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _answered(turn: Turn) -> list[dict[str, Any]]:
    of_calls = [{"role": "tool", "name": call.name or "unknown", "content": call.result} for call in turn.calls]
    return [*of_calls, *([{"role": "user", "content": turn.observation}] if turn.observation else [])]
