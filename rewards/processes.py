"""What processes of verifiers' own have in common: how they start, and that none outlives its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent ends; end at once if that has happened already.

    It holds even while C code keeps the interpreter, and is lost at a change of user. The kernel means the parent's
    *thread*: see ``on_staying_thread``. Where there is no such call (not Linux), a thread watches.
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


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session of its own, with all that it has started, and wait for its end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def on_staying_thread(function: Callable[[], T]) -> T:
    """What a function gives, or raises, on a thread that lives as long as this process: processes are started there."""
    global _thread
    with _lock:
        if _thread is None:
            _thread = threading.Thread(target=_serve, name="process-starter", daemon=True)
            _thread.start()
    result: Future[T] = Future()
    _orders.put((function, result))
    return result.result()


_orders: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
_thread: threading.Thread | None = None
_lock = threading.Lock()


def _serve() -> None:
    while True:
        function, result = _orders.get()
        try:
            result.set_result(function())
        except BaseException as why:  # the caller's to handle
            result.set_exception(why)


def _forget() -> None:
    """In a forked child there is no such thread."""
    global _orders, _thread, _lock
    _orders, _thread, _lock = queue.SimpleQueue(), None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
