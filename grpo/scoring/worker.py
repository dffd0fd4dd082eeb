"""The process in which reward functions run: loads them, then answers calls until its pipe closes.

Standard library only (``rewards.processes`` too is no more than that): a worker starts in milliseconds and imports no
torch unless a reward function does. It is a fresh interpreter, so nothing of the trainer (CUDA, threads, its
``__main__``) is in it.

It may be killed at any moment, and is: ``process.py`` is the other end of the pipe.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from grpo.scoring.call import Call, FunctionSpec, LoadError, RewardFunction
from grpo.scoring.messages import Failure, Job, NotLoaded, Outcome, Ready, encode
from grpo.user_code import import_ours
from rewards.processes import die_with_parent, limit_memory


@dataclass(frozen=True)
class Setup:
    functions: list[FunctionSpec]
    memory_bytes: int | None
    max_steps: int


def serve(pipe_fd: int, stack_fd: int, parent_pid: int) -> None:
    """Entry point of the process. ``stack_fd`` receives stack dumps: on a crash, and on SIGUSR1 when time is up."""
    die_with_parent(parent_pid)
    _survive_signals_for_the_trainer()
    faulthandler.enable(stack_fd, all_threads=False)
    faulthandler.register(signal.SIGUSR1, stack_fd, all_threads=False)
    pipe = Connection(pipe_fd)
    # Neither a child that a function forks nor a program that it starts may answer in our name, or hold the pipe open.
    os.register_at_fork(after_in_child=pipe.close)
    os.set_inheritable(pipe_fd, False)
    setup: Setup = pickle.loads(pipe.recv_bytes())
    limit_memory(setup.memory_bytes)
    import_ours()

    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    functions, causes = _load_all(setup.functions)
    if any(causes):
        pipe.send_bytes(encode(NotLoaded(causes)))
        return
    pipe.send_bytes(encode(Ready([function.signature for function in functions])))
    with contextlib.suppress(EOFError, OSError):
        while True:
            job: Job = pickle.loads(pipe.recv_bytes())
            state = SimpleNamespace(global_step=job.step, max_steps=setup.max_steps)
            calls = [Call(functions[job.function], request, state) for request in job.requests]
            _run(calls, lambda index, outcome: pipe.send_bytes(_encoded(outcome, index)))
    os._exit(0)  # the trainer has gone or has closed the pipe; a function's own threads shall not keep us


def _load_all(specs: list[FunctionSpec]) -> tuple[list[RewardFunction], list[str | None]]:
    """The functions that can be loaded, and for each of all of them why it cannot be, or None."""
    functions: list[RewardFunction] = []
    causes: list[str | None] = []
    for spec in specs:
        try:
            functions.append(RewardFunction(spec))
            causes.append(None)
        except LoadError as why:
            causes.append(str(why))
    return functions, causes


def _run(calls: list[Call], send: Callable[[int, Outcome], None]) -> None:
    """Make calls of one function: one after the other, or, where it is async, all awaited together."""
    function = calls[0].function
    if function.signature.is_async:
        from grpo.scoring.awaiting import run_together

        run_together(calls, function.spec.timeout, send)
    else:
        for index, call in enumerate(calls):
            send(index, call.run(_wait_for))


def _wait_for(awaitable: Awaitable[Any]) -> Any:
    from grpo.scoring.awaiting import wait_for

    return wait_for(awaitable)


def _encoded(outcome: Outcome, index: int) -> bytes:
    """The outcome as JSON; where JSON or the memory cannot hold what the function logged, the failure that says so."""
    try:
        return encode(outcome, index)
    except Exception as why:
        message = f"what it logged cannot be written as JSON: {type(why).__name__}: {why}"
        return encode(Failure("error", message, restart=isinstance(why, MemoryError)), index)


def _survive_signals_for_the_trainer() -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process; it is the trainer that decides, and kills us by SIGKILL.

    A handler, not SIG_IGN: that would be inherited by programs a function starts. Forked children die as usual.
    """
    worker = os.getpid()

    def stay(number: int, frame: Any) -> None:
        if os.getpid() != worker:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stay)
    signal.signal(signal.SIGINT, stay)
