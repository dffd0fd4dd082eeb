"""The trainer's end of a scoring worker: start it, hand it a job, kill it when it is late, start it again."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

from grpo.scoring.worker import Setup

BOOT = "import sys; sys.path[:] = sys.argv[4:]; from grpo.scoring.worker import serve; serve(*map(int, sys.argv[1:4]))"
START_TIMEOUT = 300.0  # a reward function may import torch from a cold network disk
STALL_TIMEOUT = 30  # seconds one read or write of the pipe may block: a stopped worker must not stop the trainer


class WorkerFailed(Exception):
    """A worker could not be started. ``args[0]``: the cause, or causes by the index of the function at fault."""


class WorkerProcess:
    """One worker and its pipe. All methods must be called from threads that live as long as the worker shall:
    the kernel ties a worker's life to the *thread* that started it (PR_SET_PDEATHSIG)."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._lock = threading.Lock()  # held where a process is made or unmade for good
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> list[dict[str, Any]]:
        """Start the process and wait until it has imported every function; what it says of each.

        Raises:
            WorkerFailed: a function cannot be loaded.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            stall = struct.pack("ll", STALL_TIMEOUT, 0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
            self._pipe = Connection(ours.detach())
            fds = (theirs.fileno(), self._stacks.fileno())
            path = [entry or os.getcwd() for entry in sys.path]
            # A new interpreter: no fork (CUDA, threads), and not multiprocessing's spawn, which runs __main__ again.
            with self._lock:
                if self._closed:
                    raise WorkerFailed("scoring was closed")
                self._process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, *map(str, fds), str(os.getpid()), *path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=fds,
                    start_new_session=True,  # Ctrl-C is the trainer's; and programs a function started die with it
                )
        try:
            self._pipe.send_bytes(pickle.dumps(self._setup))
            if not self._pipe.poll(START_TIMEOUT):
                raise WorkerFailed(f"importing it took longer than {START_TIMEOUT:g} s")
            message = json.loads(self._pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerFailed(f"the process that imports it {self._end()}") from None
        if "load_errors" in message:
            raise WorkerFailed({int(index): why for index, why in message["load_errors"].items()})
        return message["ready"]

    def run(self, job: bytes, calls: int, timeout: float) -> list[dict[str, Any]]:
        """Send a job of ``calls`` calls; its answers in order.

        Silence for ``timeout`` seconds, or the end of the process, ends the job: the process is replaced, and the calls
        that were not answered get ``{"failure": "timeout" | "crashed", "message": ..., "lost": True}``.

        Raises:
            WorkerFailed: the process cannot be replaced, or ``close`` was called.
        """
        if self._pipe is None or self._pipe.poll(0):  # it died while idle; nobody's fault that matters
            self.restart()
        assert self._pipe is not None
        answers: dict[int, dict[str, Any]] = {}
        failure: dict[str, Any] = {}
        try:
            self._pipe.send_bytes(job)
            while len(answers) < calls:
                if not self._pipe.poll(timeout):
                    where = self._dump_stack()
                    failure = {"failure": "timeout", "message": f"no result after {timeout:g} s\n{where}"}
                    break
                answer = json.loads(self._pipe.recv_bytes())
                answers[answer["call"]] = answer
        except (EOFError, OSError):
            failure = {"failure": "crashed", "message": f"the worker {self._end()}\n{self._read_stacks()}"}
        if failure or any(answer.get("restart") for answer in answers.values()):
            self.restart()
        return [answers.get(call, {**failure, "lost": True}) for call in range(calls)]

    def restart(self) -> None:
        """Kill the process and start a new one.

        Raises:
            WorkerFailed: it cannot be started, or ``close`` was called.
        """
        self._kill()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._stacks.seek(0)
        self._stacks.truncate()
        self.start()

    def close(self) -> None:
        """Kill the process for good, from any thread; a ``run`` that waits for it ends at once. May be called twice."""
        with self._lock:
            self._closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _end(self) -> str:
        """How the process ended, in words."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code >= 0:
            return f"exited with status {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"

    def _dump_stack(self) -> str:
        """Where the process hangs: its Python stack. faulthandler writes it even while C code holds the interpreter."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 0.2
        while not self._read_stacks() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.01)  # for the rest of it
        return self._read_stacks()

    def _read_stacks(self) -> str:
        text = os.pread(self._stacks.fileno(), 16384, 0).decode(errors="replace")  # the offset is the child's
        return "\n".join(
            line for line in text.splitlines() if not re.search(r"scoring/(worker|call)\.py|<string>", line)
        )
