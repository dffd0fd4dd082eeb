"""How ``grpo audit`` plays an environment: one who knows, where there is a script, and three who do not try.

A script is a function ``play(row)`` beside the environment's class. It returns the turns of one who does the task: a
text for a turn of a game, or ``{"name": …, "arguments": {…}}`` for a call of a tool.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.environments.living import EpisodeFailed
from grpo.environments.loading import About
from grpo.environments.worlds import Worlds

KNOWING, IDLE, BABBLING, LOOPING = "the script", "idle play", "babbling", "looping"
CHEATS = (IDLE, BABBLING, LOOPING)
WORDS = "let me see maybe the answer is what about then so we try again and think of it good now yes no"

Turn = str | dict[str, Any]


@dataclass
class Played:
    """What came of one episode: what was paid (None where nothing is), what was observed, which calls were answered by
    an error (the call and the answer), and why it failed."""

    paid: float | None = None
    observed: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failure: str = ""
    message: str = ""


def cheats(about: About, row: int, max_turns: int) -> dict[str, list[Turn]]:
    """The turns of players who do not try, for a row. They depend on the row's number alone."""
    draw = random.Random(f"audit/{row}")
    if about.game:
        babble = [" ".join(draw.choices([*WORDS.split(), str(draw.randint(0, 99))], k=12)) for _ in range(max_turns)]
        return {IDLE: [""] * max_turns, BABBLING: list(babble), LOOPING: [str(draw.randint(1, 9))] * max_turns}
    schemas = [tool["function"] for tool in about.tools]
    babbled = [_call(draw.choice(schemas), lambda kind: _drawn(kind, draw)) for _ in range(max_turns)]
    looped = [_call(schema, _same) for schema in schemas for _ in range(max_turns)]
    return {IDLE: [], BABBLING: list(babbled), LOOPING: list(looped)}


def _call(schema: dict[str, Any], value_of: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    parameters = schema["parameters"]
    needed = parameters.get("required", [])
    return {"name": schema["name"], "arguments": {name: value_of(parameters["properties"][name]) for name in needed}}


def _same(kind: dict[str, Any]) -> Any:
    """A value of a type that JSON schema describes; the same each time."""
    if "enum" in kind:
        return kind["enum"][0]
    name = kind.get("type")
    named = name[0] if isinstance(name, list) else name
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}, "null": None}.get(named, "1")


def _drawn(kind: dict[str, Any], draw: random.Random) -> Any:
    if "enum" in kind:
        return draw.choice(kind["enum"])
    name = kind.get("type")
    if name == "integer":
        return draw.randint(0, 99)
    return " ".join(draw.choices(WORDS.split(), k=6)) if name in ("string", None) else _same(kind)


def played(worlds: Worlds, row: dict[str, Any], turns: Sequence[Turn], seed: int) -> Played:
    """Play an episode, up to its end or that of ``turns``."""
    result, total = Played(), 0.0
    world = worlds.open(seed)
    try:
        result.observed.append(world.ask("reset", row).result() or "")
        for turn in turns:
            if not worlds.about.game:
                assert isinstance(turn, dict)
                calls = [(turn["name"], turn["arguments"])]
                ((text, error),) = world.ask("call", calls).result()
                result.observed.append(text)
                result.errors += [f"{turn['name']}: {text}"] if error else []
                continue
            said = world.ask("step", str(turn)).result()
            result.observed.append(said["observation"])
            if said["reward"] is not None:
                total, result.paid = total + said["reward"], 0.0
            if said["done"]:
                break
        in_the_end = world.ask("get_reward").result()
        if in_the_end is not None or result.paid is not None:
            result.paid = total + (in_the_end or 0.0)
    except EpisodeFailed as why:
        result.paid, result.failure, result.message = None, why.cause, str(why)
    finally:
        world.close()
    return result
