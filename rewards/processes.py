"""What worker processes have in common: how they start, what they may use, and that none outlives its parent.

Verifiers with workers of their own (``rewards.math``, ``rewards.sandbox``) use it, and so do the trainer's scoring
workers. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1
ROOT = str(Path(__file__).resolve().parents[1])  # holds rewards, and grpo if it is installed
# ROOT comes first during this import, so that a user's own `rewards` or `grpo` is not taken for ours.
BOOT = "import sys; sys.path[:] = sys.argv[{n}:]; from {module} import serve; sys.path.pop(0); "
BOOT += "serve(*map(int, sys.argv[1:{n}]))"


# --- in the process that is started -----------------------------------------------------------------------------------


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends; end at once if that has happened already.

    The kernel does so even while C code holds the interpreter. A change of user undoes it. The kernel watches the
    *thread* that started this process: see ``on_staying_thread``. On systems other than Linux, a thread of this process
    watches instead.
    """
    bound = False
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            bound = ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0
    if os.getppid() != parent_pid:  # it ended before the kernel knew
        os._exit(1)
    if not bound:
        threading.Thread(target=_watch, args=(parent_pid,), daemon=True).start()


def _watch(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)


def limit_memory(memory_bytes: int | None) -> None:
    """Limit this process's address space, never above its present limit. Core files are turned off too."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --- in the process that starts it ------------------------------------------------------------------------------------


def start_python(module: str, fds: Sequence[int], *, stdout: int | None = None) -> subprocess.Popen[bytes]:
    """Start a new interpreter that calls ``module.serve(*fds, pid of this process)``.

    It has this process's import path and the open files ``fds``, and leads a session of its own: Ctrl-C does not reach
    it, and ``kill`` ends it together with the programs that it started. It is neither a fork (CUDA, threads) nor a
    "spawn" of multiprocessing (which runs ``__main__`` again). ``serve`` should begin with ``die_with_parent``.

    Raises:
        OSError: the system has no room for another process.
    """
    path = [entry or os.getcwd() for entry in sys.path]
    boot = BOOT.format(module=module, n=len(fds) + 2)
    command = [sys.executable, "-c", boot, *map(str, fds), str(os.getpid()), ROOT, *path]
    return on_staying_thread(
        lambda: subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, pass_fds=tuple(fds), start_new_session=True
        )
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session of its own, with all that it has started, and wait for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def how_it_ended(process: subprocess.Popen[bytes], patience: float) -> str:
    """How a process ended by itself, in words. It has closed its pipe; its end is awaited for ``patience`` seconds."""
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        return "closed its pipe"
    if code >= 0:
        return f"exited with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def on_staying_thread(function: Callable[[], T]) -> T:
    """Run a function on a thread that lives as long as this process, and return or raise what it does.

    Processes are started there: ``die_with_parent`` ties a process to the thread that started it.
    """
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_serve, name="process-starter", daemon=True)
            _thread.start()
    result: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    _orders.put((function, result))
    value, why = result.get()
    if why is not None:
        raise why
    return value


_orders: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]]] = queue.SimpleQueue()
_thread: threading.Thread | None = None
_lock = threading.Lock()


def _serve() -> None:
    while True:
        function, result = _orders.get()
        try:
            result.put((function(), None))
        except BaseException as why:  # the caller's to handle
            result.put((None, why))


def _forget() -> None:
    """In a forked child there is no such thread."""
    global _orders, _thread, _lock
    _orders, _thread, _lock = queue.SimpleQueue(), None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
