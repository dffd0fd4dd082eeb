"""Calls of async reward functions, in one event loop.

A worker imports this file when it has something to await: asyncio takes longer to import than the rest of a worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from grpo.scoring.call import Call, outcome_of
from grpo.scoring.messages import Failure, Outcome

CANCELLING = 0.5  # seconds in which a cancelled call may tidy up

_loop = asyncio.new_event_loop()  # one for the process's life: clients that a function keeps stay bound to it


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """What an awaitable gives, or raises."""

    async def awaited() -> Any:
        return await awaitable

    return _loop.run_until_complete(awaited())


def run_together(calls: Sequence[Call], timeout: float, send: Callable[[int, Outcome], None]) -> None:
    """Await calls of an async function together, each for ``timeout`` seconds at most; ``send`` gets each outcome."""

    async def run(index: int, call: Call) -> None:
        send(index, await _run(call, timeout))

    async def run_all() -> None:
        await asyncio.gather(*(run(index, call) for index, call in enumerate(calls)))

    _loop.run_until_complete(run_all())


async def _run(call: Call, timeout: float) -> Outcome:
    try:
        coroutine = call.start()
    except BaseException as why:
        return outcome_of(why)
    task = asyncio.ensure_future(_guarded(call, coroutine))
    done, _ = await asyncio.wait({task}, timeout=timeout)
    if done:
        return task.result()
    stack = _stack(coroutine)
    task.cancel()
    await asyncio.wait({task}, timeout=CANCELLING)
    return Failure("timeout", f"no result after {timeout:g} s, awaiting at:\n{stack}")


async def _guarded(call: Call, coroutine: Awaitable[Any]) -> Outcome:
    try:  # here, and not around the task: a SystemExit in a task would end the event loop
        return call.answer(await coroutine)
    except BaseException as why:
        return outcome_of(why)


def _stack(coroutine: Any) -> str:
    """Where a coroutine waits, line by line from the outermost."""
    lines = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
        coroutine = coroutine.cr_await
    return "\n".join(lines)
