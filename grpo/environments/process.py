"""The process of one episode: an environment of its own, and the calls that the trainer asks for.

Standard library only. It is forked from the zygote, which has imported the user's code. It may be killed at any moment,
and is.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import json
import math
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from grpo import user_code
from grpo.environments import messages
from grpo.environments.loading import Loaded, accepted, tools_of
from grpo.errors import UserError

OWN_FOLDER = str(Path(__file__).parent)
STEP = "expected (observation, done) or (observation, reward, done)"


class Broken(Exception):
    """A method returned what its protocol does not have."""


def serve(channel: socket.socket, loaded: Loaded, seed: int, stacks: int, memory_bytes: int | None) -> None:
    """Answer until the channel closes. ``stacks`` is a file that receives stack dumps: on a crash, and on SIGUSR1. The
    process may take ``memory_bytes`` of address space more than it has now."""
    faulthandler.enable(stacks, all_threads=False)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    # A child that a tool forks shall neither answer in our name nor hold the channel open.
    os.register_at_fork(after_in_child=channel.close)
    _limit(memory_bytes)
    _seed(seed)
    episode = _Episode(loaded)
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, argument = messages.receive(channel)
            channel.sendall(_answered(getattr(episode, what), argument))


def _answered(method: Callable[[Any], Any], argument: Any) -> bytes:
    """The answer to a call, or the failure that it ends the episode with."""
    try:
        return messages.answer(method(argument))
    except Broken as why:
        return messages.failure("error", str(why))
    except UserError as why:  # of ``try_out``
        return messages.failure("refused", str(why))
    except MemoryError as why:
        return messages.failure("memory", user_code.traceback_of(why, OWN_FOLDER))
    except Exception as why:
        return messages.failure("error", user_code.traceback_of(why, OWN_FOLDER))
    except BaseException as why:  # SystemExit, KeyboardInterrupt
        return messages.failure("crashed", user_code.traceback_of(why, OWN_FOLDER))


class _Episode:
    """What the trainer can ask for. A method's name is the request, and what it returns is plain."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self.environment: Any = None
        self.wait_for = _Loop()

    def try_out(self, _: None) -> dict[str, Any]:
        return asdict(self.loaded.try_out())

    def reset(self, row: dict[str, Any]) -> str | None:
        """Construct and reset the environment. What ``reset`` says belongs to the prompt."""
        self.environment = self.loaded.construct()
        if self.environment is None:
            return None
        reset = self.environment.reset
        said = self.wait_for(reset(**accepted(reset, row)))
        if said is not None and not isinstance(said, str):
            raise Broken(f"reset returned {user_code.brief(said)}; expected a str or None")
        return None if said is None else messages.cut(said)

    def call(self, calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
        """Call tools, one after the other, async ones together after the others as TRL does. Each gives its result as
        text and the kind of its error, which is empty where it returned."""
        tools = tools_of(self.environment, self.loaded.functions)
        results = [_guarded(partial(tools[name], **given)) for name, given in calls]
        waiting = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
        for i, result in zip(waiting, self.wait_for.all([results[i] for i in waiting]), strict=True):
            results[i] = result
        return [_as_text(result) for result in results]

    def step(self, text: str) -> dict[str, Any]:
        """One turn of a game."""
        result = self.wait_for(self.environment.step(text))
        if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
            raise Broken(f"step returned {user_code.brief(result)}; {STEP}")
        observation, *reward, done = result
        if observation is not None and not isinstance(observation, str):
            raise Broken(f"step returned the observation {user_code.brief(observation)}; expected a str or None")
        if not isinstance(done, bool) and not (type(done).__name__ in ("bool", "bool_") and hasattr(done, "item")):
            raise Broken(f"step returned {user_code.brief(done)} for done, expected a bool; {STEP}")
        paid = _reward(reward[0], "step") if reward else None
        return {"observation": messages.cut(observation or ""), "reward": paid, "done": bool(done)}

    def get_reward(self, _: None) -> float | None:
        get_reward = getattr(self.environment, "get_reward", None)
        return None if get_reward is None else _reward(self.wait_for(get_reward()), "get_reward")


class _Raised:
    """An ordinary exception of a tool. The model reads it."""

    def __init__(self, why: Exception) -> None:
        self.why = why


def _guarded(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except MemoryError:
        raise
    except Exception as why:
        return _Raised(why)


def _as_text(result: Any) -> tuple[str, str]:
    """A tool's result as the model reads it. Text parts of a list of messages' parts are joined, as in a chat."""
    if isinstance(result, _Raised):
        return error_text(f"{type(result.why).__name__}: {result.why}"), "raised"
    if isinstance(result, list) and result and all(isinstance(p, dict) and p.get("type") == "text" for p in result):
        result = "".join(str(part.get("text", "")) for part in result)
    try:
        return messages.cut(str(result)), ""
    except MemoryError:
        raise
    except Exception as why:  # its __str__ is the user's
        return error_text(f"the result cannot be shown: {type(why).__name__}: {why}"), "raised"


def error_text(message: str) -> str:
    """What the model reads instead of a result."""
    return json.dumps({"error": messages.cut(message)}, ensure_ascii=False)


def _reward(value: Any, of: str) -> float | None:
    if value is None:
        return None
    number = user_code.as_number(value)
    if number is None or not math.isfinite(number):
        raise Broken(f"{of} returned the reward {user_code.brief(value)}; expected a finite number, or None")
    return number


class _Loop:
    """Awaits what methods return, in one event loop for the episode, which is made when something is to be awaited."""

    def __init__(self) -> None:
        self._loop: Any = None

    def __call__(self, result: Any) -> Any:
        if not inspect.isawaitable(result):
            return result
        (awaited,) = self.all([result], raise_all=True)
        return awaited

    def all(self, awaitables: list[Any], *, raise_all: bool = False) -> list[Any]:
        """Await several together. An ordinary exception stands in its place, unless ``raise_all``."""
        if not awaitables:
            return []
        import asyncio

        async def guarded(awaitable: Any) -> Any:
            try:
                return await awaitable
            except MemoryError:
                raise
            except Exception as why:
                if raise_all:
                    raise
                return _Raised(why)

        async def together() -> list[Any]:
            return await asyncio.gather(*(guarded(awaitable) for awaitable in awaitables))

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop.run_until_complete(together())


def _limit(memory_bytes: int | None) -> None:
    """Limit the address space to what imports took and ``memory_bytes`` beside it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is None or not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + memory_bytes
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _seed(seed: int) -> None:
    """Draws inside the environment are the episode's own."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed % 2**63)
