"""The process in which reward functions run: loads them, then answers calls until its pipe closes.

Standard library only: a worker starts in milliseconds and never imports torch unless a reward function does. It is a
fresh interpreter, so nothing of the trainer (CUDA, threads, its ``__main__``) is in it. What it sends back is JSON of
plain values: the trainer never unpickles anything that came from a reward function.

It may be killed at any moment, and is: see ``process.py`` for the other end of the pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from grpo.scoring.call import Call, FunctionSpec, LoadError, RewardFunction
from grpo.user_code import import_ours


@dataclass(frozen=True)
class Setup:
    functions: list[FunctionSpec]
    memory_bytes: int | None
    max_steps: int


def serve(pipe_fd: int, stack_fd: int, parent_pid: int) -> None:
    """Entry point of the process. ``stack_fd`` receives stack dumps: on a crash, and on SIGUSR1 when time is up."""
    _die_with(parent_pid)
    _survive_signals_for_the_trainer()
    faulthandler.enable(stack_fd, all_threads=False)
    faulthandler.register(signal.SIGUSR1, stack_fd, all_threads=False)
    pipe = Connection(pipe_fd)
    setup: Setup = pickle.loads(pipe.recv_bytes())
    _limit_memory(setup.memory_bytes)
    import_ours()

    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def send(message: dict[str, Any]) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    functions, errors = [], {}
    for index, spec in enumerate(setup.functions):
        try:
            functions.append(RewardFunction(spec))
        except LoadError as why:
            errors[index] = str(why)
    if errors:
        send({"load_errors": errors})
        return
    send({"ready": [{"is_async": f.is_async, "wants_ids": f.wants_ids, "needs": f.needs} for f in functions]})
    loop = asyncio.new_event_loop()  # one for the process's life: clients a function keeps stay bound to it
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pickle.loads(pipe.recv_bytes())
            _run_job(functions[job["function"]], job, setup.max_steps, loop, send)
    os._exit(0)  # the trainer has gone or has closed the pipe; a function's own threads shall not keep us


def _run_job(
    function: RewardFunction,
    job: dict[str, Any],
    max_steps: int,
    loop: asyncio.AbstractEventLoop,
    send: Callable[[dict[str, Any]], None],
) -> None:
    """Answer every call of a job: one after the other, or, for an async function, all awaited together."""
    state = SimpleNamespace(global_step=job["step"], max_steps=max_steps)
    calls = [Call(function, payload, state) for payload in job["calls"]]
    if not function.is_async:
        for index, call in enumerate(calls):
            send({"call": index, **call.run(loop)})
        return

    async def answer(index: int, call: Call) -> None:
        send({"call": index, **await call.run_async(function.spec.timeout)})

    async def answer_all() -> None:
        await asyncio.gather(*(answer(index, call) for index, call in enumerate(calls)))

    loop.run_until_complete(answer_all())


def _die_with(parent_pid: int) -> None:
    """Never outlive the trainer, even if it is SIGKILLed and even if a function holds the interpreter in C."""
    bound = False
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            pr_set_pdeathsig = 1
            bound = ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent_pid:  # it died before the kernel knew
        os._exit(1)
    if not bound:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True).start()


def _watch_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


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


def _limit_memory(memory_bytes: int | None) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
