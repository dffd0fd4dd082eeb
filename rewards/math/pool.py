"""The parent's end of the math workers: start them, ask them, kill them when they are late, and start them again.

Safe from many threads at once.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from typing import Any

from rewards.processes import how_it_ended, kill, start_python, worker_pid

WORKER = "rewards.math.worker"
START_TIMEOUT = 120.0  # seconds; sympy may come from a cold network disk


class WorkerFailed(RuntimeError):
    """A worker cannot be started. No answer is at fault."""


class WorkerTimeout(Exception):
    """No reply in time; the worker was killed and replaced."""


class WorkerDied(Exception):
    """Two workers in turn ended during the request; ``args[0]`` says how."""


class Pool:
    """``workers`` processes, each answering one request at a time.

    Raises:
        WorkerFailed: one cannot be started.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last one used has the warmest caches
        self._all = [_Worker() for _ in range(workers)]
        try:
            for worker in self._all:
                worker.launch()
            for worker in self._all:
                worker.await_ready()
                self._idle.put(worker)
        except WorkerFailed:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes that live now."""
        processes = [worker.process for worker in self._all if worker.process]
        return [worker_pid(process) for process in processes if process.poll() is None]

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply of the next idle worker. ``timeout`` seconds count from when it has the request.

        A worker that dies is not blamed on the request at once: another one gets it.

        Raises:
            WorkerTimeout, WorkerDied: the request was too much.
            WorkerFailed: the worker cannot be replaced, or the pool was closed.
        """
        worker = self._idle.get()
        try:
            started = time.monotonic()
            try:
                return worker.ask(request, timeout)
            except WorkerDied:
                return worker.ask(request, max(0.1, timeout - (time.monotonic() - started)))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Kill all workers; requests under way end with WorkerFailed. May be called twice."""
        for worker in self._all:
            worker.close()


class _Worker:
    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self._pipes: list[int] = []  # where requests are written, where replies are read
        self._ready = False
        self._closed = False
        self._lock = threading.Lock()  # held while a process is started or ended

    def launch(self) -> None:
        with self._lock:
            if self._closed:
                raise WorkerFailed("the math workers were stopped")
            theirs_in, ours_out = os.pipe()
            ours_in, theirs_out = os.pipe()
            os.set_blocking(ours_in, False)
            try:
                # Libraries print, and nobody reads it.
                self.process = start_python(WORKER, (theirs_in, theirs_out), stdout=subprocess.DEVNULL)
            except OSError as why:
                os.close(ours_out)
                os.close(ours_in)
                raise WorkerFailed(f"cannot start a math worker: {why}") from None
            finally:
                os.close(theirs_in)
                os.close(theirs_out)
            self._pipes = [ours_out, ours_in]
            self._ready = False

    def await_ready(self) -> None:
        try:
            if not self._ready and self._reply(START_TIMEOUT) == {"ready": True}:
                self._ready = True
        except (WorkerTimeout, WorkerDied) as why:
            self._end()
            raise WorkerFailed(
                f"a math worker does not start ({why}); is math-verify installed for {sys.executable}?"
            ) from None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        if self.process is None or self.process.poll() is not None:  # it died while idle, or was killed for being late
            self._end()
            self.launch()
        self.await_ready()
        try:
            os.write(self._pipes[0], json.dumps(request).encode() + b"\n")
            return self._reply(timeout)
        except (BrokenPipeError, WorkerDied):
            how = self._end()
            raise WorkerDied(how) from None
        except WorkerTimeout:
            self._end()
            with contextlib.suppress(WorkerFailed):  # if it still fails, the next request says so
                self.launch()  # ready by the time it is needed
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self.process is not None:
                kill(self.process)

    def _reply(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._pipes[1], select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise WorkerTimeout(f"no reply after {timeout:g} s")
            data = os.read(self._pipes[1], 1 << 16)
            if not data or len(line) > 1 << 16:
                raise WorkerDied("closed its pipe")
            line += data
        return json.loads(line)

    def _end(self) -> str:
        """Make sure that the process has ended, and say how it ended."""
        with self._lock:
            process, self.process = self.process, None
            pipes, self._pipes = self._pipes, []
            for pipe in pipes:
                os.close(pipe)
        if process is None:
            return "not running"
        how = how_it_ended(process, 0.05)
        kill(process)
        return how


# --- the pool of this process ----------------------------------------------------------------------------------------

_pool: Pool | None = None
_pool_lock = threading.Lock()


def start(workers: int = 2) -> None:
    """Start the workers, if they are not running.

    Raises:
        WorkerFailed: they cannot be started.
    """
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = Pool(workers)


def stop() -> None:
    """End the workers. The next request starts them again."""
    global _pool
    with _pool_lock:
        pool, _pool = _pool, None
    if pool is not None:
        pool.close()


def current() -> Pool:
    """The pool, started if it is not running."""
    start()
    with _pool_lock:
        pool = _pool
    if pool is None:
        raise WorkerFailed("the math workers were stopped")
    return pool


def _forget() -> None:
    """In a forked child: the workers and the lock are the parent's."""
    global _pool, _pool_lock
    _pool, _pool_lock = None, threading.Lock()


atexit.register(stop)
os.register_at_fork(after_in_child=_forget)
