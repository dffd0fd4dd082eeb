"""The trainer's end of a scoring worker: start it, hand it a job, kill it when it is late, start it again."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from grpo.scoring.call import OWN_FOLDER
from grpo.scoring.messages import (
    Answer,
    BrokenContract,
    Failure,
    Garbled,
    NotLoaded,
    Outcome,
    Ready,
    Signature,
    decode,
)
from grpo.scoring.worker import Setup
from rewards.processes import how_it_ended, kill, start_python, worker_pid

WORKER = "grpo.scoring.worker"
START_TIMEOUT = 300.0  # seconds; a reward function may import torch from a cold network disk
STALL_TIMEOUT = 30.0  # seconds one read or write of the pipe may block: a stopped worker must not stop the trainer


class WorkerFailed(Exception):
    """A worker could not be started; the message says why."""


class FunctionsNotLoaded(WorkerFailed):
    """A worker could not load some reward functions. ``causes`` has one entry per function: why, or None if loaded."""

    def __init__(self, causes: list[str | None]) -> None:
        super().__init__("; ".join(filter(None, causes)))
        self.causes = causes


class WorkerProcess:
    """One worker and its pipe. ``close`` may be called from any thread, the other methods from one at a time.

    Of the variables that look like secrets the worker gets those in ``environment``.
    """

    def __init__(self, setup: Setup, environment: Sequence[str] = ()) -> None:
        self._setup = setup
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stacks = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._lock = threading.Lock()  # held where a process is made or unmade for good
        self._closed = False

    @property
    def pid(self) -> int | None:
        return worker_pid(self._process) if self._process else None

    def start(self) -> list[Signature]:
        """Start the process, wait until it has imported every function, and return what each asks for.

        Raises:
            FunctionsNotLoaded: it cannot import them all.
            WorkerFailed: it does not start, or ``close`` was called.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            stall = struct.pack("ll", int(STALL_TIMEOUT), int(STALL_TIMEOUT % 1 * 1e6))  # a timeval
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, stall)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, stall)
            pipe = self._pipe = Connection(ours.detach())
            with self._lock:
                if self._closed:
                    raise WorkerFailed("scoring was closed")
                try:
                    self._process = start_python(
                        WORKER, (theirs.fileno(), self._stacks.fileno()), keep=self._environment
                    )
                except OSError as why:
                    raise WorkerFailed(f"cannot start a process: {why}") from None
        try:
            pipe.send_bytes(pickle.dumps(self._setup))
            if not pipe.poll(START_TIMEOUT):
                raise WorkerFailed(f"importing it took longer than {START_TIMEOUT:g} s")
            _, message = decode(pipe.recv_bytes())
        except (EOFError, OSError):
            raise WorkerFailed(f"the process that imports it {how_it_ended(self._process, 1.0)}") from None
        except Garbled as why:
            raise WorkerFailed(str(why)) from None
        if isinstance(message, NotLoaded):
            raise FunctionsNotLoaded(message.causes)
        assert isinstance(message, Ready), message
        return message.signatures

    def run(self, job: bytes, requests: int, timeout: float) -> list[Outcome]:
        """Send a pickled job of ``requests`` requests and return their outcomes in order.

        Silence for ``timeout`` seconds, or the end of the process, ends the job. The process is then replaced, and
        requests that were not answered are lost: their outcome is a ``Failure`` with ``lost``.

        Raises:
            WorkerFailed: the process cannot be replaced, or ``close`` was called.
        """
        if self._pipe is None or self._pipe.poll(0):  # it died while idle; nobody's fault that matters
            self.restart()
        assert self._pipe is not None
        outcomes: dict[int, Outcome] = {}
        failure: Failure | None = None  # of the requests that were not answered
        try:
            self._pipe.send_bytes(job)
            while failure is None and len(outcomes) < requests:
                if self._pipe.poll(timeout):
                    index, outcome = _outcome(self._pipe.recv_bytes(), requests)
                    outcomes[index] = outcome
                else:
                    where = self._dump_stack()
                    failure = Failure("timeout", f"no result after {timeout:g} s\n{where}", lost=True)
        except (EOFError, OSError) as why:
            failure = Failure("crashed", f"the worker {self._end(why)}\n{self._read_stacks()}", lost=True)
        except Garbled as why:
            failure = Failure("crashed", str(why), lost=True)
        if failure is not None or any(isinstance(o, Failure) and o.restart for o in outcomes.values()):
            self.restart()
        if failure is not None:
            outcomes = dict.fromkeys(range(requests), failure) | outcomes
        return [outcomes[index] for index in range(requests)]

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
            kill(self._process)

    def _end(self, why: Exception) -> str:
        """How the process ended, in words."""
        assert self._process is not None
        if isinstance(why, BlockingIOError):
            return f"neither read nor wrote its pipe for {STALL_TIMEOUT:g} s"
        return how_it_ended(self._process, 1.0)

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
        return "\n".join(line for line in text.splitlines() if OWN_FOLDER not in line and '"<string>"' not in line)


def _outcome(data: bytes, requests: int) -> tuple[int, Outcome]:
    """The number of a request, and its outcome. Raises Garbled where the bytes hold none."""
    index, message = decode(data)
    if index not in range(requests) or not isinstance(message, (Answer, Failure, BrokenContract)):
        raise Garbled(f"the worker sent {data[:60]!r}, which answers no request")
    return index, message
