"""The trainer's end of the sandbox: zygotes, one run at a time in each, deadlines, output limits, respawning.

A run is a channel: one end of a socket whose other end is in the program's process. What comes out of it is hostile
bytes. This file counts them and cuts them off; whoever asked for the run reads them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from rewards.processes import kill
from rewards.sandbox import program
from rewards.sandbox.nursery import Nursery
from rewards.sandbox.packages import PackageRefused, Packages
from rewards.sandbox.program import Request
from rewards.sandbox.starting import SandboxUnavailable, hello, start_place

logger = logging.getLogger(__name__)

LEVELS = ("namespaces", "landlock", "bubblewrap")  # in the order they are tried
BURIAL = 10.0  # seconds for a zygote to reap a killed child, before its next run; freeing memory takes a while
NO_PACKAGES = Packages()


class Ended(str, Enum):
    EXITED = "exited"  # by itself: by exit, an exception or a signal; ``status`` tells
    TIMEOUT = "timeout"
    OUTPUT = "output"  # more than ``max_output`` bytes
    STOPPED = "stopped"  # by the caller, who left the block without reading to the end
    LOST = "lost"  # the zygote died during the run; whether the program did it is not known


@dataclass(frozen=True)
class Limits:
    """``seconds`` of wall time for a run, megabytes of address space, bytes of output."""

    seconds: float = 6.0
    memory_mb: int = 1024
    max_output: int = 1 << 16


@dataclass
class Run:
    """One run under way: send requests, read lines, or collect everything up to its end."""

    channel: socket.socket
    deadline: float
    max_output: int
    ended: Ended | None = None
    status: int | None = None  # exit status, or minus the signal
    at_end: bool = False  # the program has closed its end
    control: socket.socket | None = None  # to its zygote
    _buffer: bytes = b""
    _received: int = 0

    def hold(self) -> None:
        """Let the program stand still, whatever threads it has left, until ``go_on``."""
        self._order(b"hold")

    def go_on(self, seconds: float) -> None:
        """Let it run again, for so long, and count its output anew."""
        self.deadline, self._received = time.monotonic() + seconds, len(self._buffer)
        self._order(b"go on")

    def _order(self, order: bytes) -> None:
        if self.control is not None and self.ended is None:
            with contextlib.suppress(OSError):  # the zygote has ended; the channel tells
                self.control.send(order)

    def send(self, data: bytes) -> None:
        """Queue bytes for the program. Reads what it says meanwhile, so that neither waits for the other."""
        view = memoryview(data)
        while view and self.ended is None and not self.at_end:
            readable, writable = self._wait(write=True)
            if readable and not self._read():
                return
            if writable:
                try:
                    view = view[self.channel.send(view) :]
                except BlockingIOError:
                    continue
                except OSError:  # it has closed its end
                    return

    def finish_sending(self) -> None:
        with contextlib.suppress(OSError):
            self.channel.shutdown(socket.SHUT_WR)

    def line(self) -> bytes | None:
        """The next line of output, without its end; None if no more will come (``ended`` may say why).

        Hostile bytes: compare them, hand them on, but do not read values from them."""
        while b"\n" not in self._buffer:
            if self.ended is not None or self.at_end or not self._wait()[0] or not self._read():
                return None
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def rest(self) -> bytes:
        """All output up to the end."""
        while self.ended is None and not self.at_end and self._wait()[0] and self._read():
            pass
        rest, self._buffer = self._buffer, b""
        return rest

    def _wait(self, write: bool = False) -> tuple[bool, bool]:
        """Whether the channel can be read or written before the deadline."""
        remaining = max(0.0, self.deadline - time.monotonic())  # 0: what is there already still counts
        poll = select.poll()
        poll.register(self.channel, select.POLLIN | (select.POLLOUT if write and remaining else 0))
        events = poll.poll(remaining * 1000)
        if not events:
            self.ended = Ended.TIMEOUT
            return False, False
        flags = events[0][1]
        return bool(flags & (select.POLLIN | select.POLLHUP | select.POLLERR)), bool(flags & select.POLLOUT)

    def _read(self) -> bool:
        """Read what there is; False at the end of the output."""
        try:
            data = self.channel.recv(1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        self._received += len(data)
        self._buffer += data
        if self._received > self.max_output:
            self.ended = Ended.OUTPUT
            return False
        self.at_end = not data
        return not self.at_end


class Sandbox:
    """Runs model-written Python in ``workers`` zygotes at once, shut in at ``level``. Safe from several threads.

    ``probe.probed_sandbox`` chooses the level; ``"unsafe"`` has resource limits alone. ``packages`` are what programs
    may import beside the standard library. With a ``nursery``, zygotes are forked from it. Close it, or use ``with``.

    Raises:
        SandboxUnavailable: the level does not work here.
        PackageRefused: a package cannot be imported in it.
    """

    def __init__(
        self, workers: int, level: str, packages: Packages = NO_PACKAGES, nursery: Nursery | None = None
    ) -> None:
        self.level = level
        self._free: queue.SimpleQueue[Place] = queue.SimpleQueue()
        self._zygotes = [Place(level, packages, nursery) for _ in range(workers)]
        try:
            for zygote in self._zygotes:
                zygote.start()
                self._free.put(zygote)
        except (SandboxUnavailable, PackageRefused):
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """The zygotes' process ids, but for those of a nursery."""
        return [zygote.process.pid for zygote in self._zygotes if zygote.process is not None]

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """The next free zygote, for runs one after the other. Waits without a limit: no run's clock ticks yet."""
        zygote = self._free.get()
        try:
            yield zygote
        finally:
            self._free.put(zygote)

    @contextlib.contextmanager
    def run(self, request: Request, limits: Limits) -> Iterator[Run]:
        """A run of a program in the next free zygote. When the block ends, so has the program, whatever it does."""
        with self.place() as place, place.run(request, limits) as run:
            yield run

    def close(self) -> None:
        """End all zygotes and what runs in them. May be called twice."""
        for zygote in self._zygotes:
            zygote.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Place:
    """A zygote seen from the trainer: one run at a time, ``run``."""

    def __init__(self, level: str, packages: Packages, nursery: Nursery | None) -> None:
        self.level = level
        self.packages = packages
        self.nursery = nursery
        self.process: subprocess.Popen[bytes] | None = None  # None for one that a nursery has forked: it ends with us
        self._control: socket.socket | None = None
        self._burying = False  # a child was killed, and the zygote has not yet said that it has reaped it
        self._closed = False

    def start(self) -> None:
        """Start the process, unless it runs, and wait until it has shut itself in."""
        if self._closed:
            raise SandboxUnavailable("the sandbox was closed")
        if self._is_ready() and self._lives():
            return
        self._kill()  # the remains of one that has died
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._begin(theirs)
        said = hello(ours)
        self._control = ours
        if "ready" not in said:
            self._kill()
            raise (PackageRefused if "package" in said else SandboxUnavailable)(said["refused"])

    def _begin(self, theirs: socket.socket) -> None:
        if self.nursery is not None:
            try:
                self.nursery.begin(self.level, self.packages, theirs)
                return
            except OSError as why:
                logger.warning("the nursery of the sandbox has ended (%s); places start without it", why)
                self.nursery = None
        self.process = start_place(self.level, self.packages, theirs.fileno())

    def _lives(self) -> bool:
        """Whether the zygote's end of the control socket is open."""
        if self._control is None:
            return False
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        try:
            return not poll.poll(0) or bool(self._control.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    @contextlib.contextmanager
    def run(self, request: Request, limits: Limits) -> Iterator[Run]:
        self.start()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        run = Run(ours, time.monotonic() + limits.seconds, limits.max_output, control=self._control)
        order = {"memory_bytes": limits.memory_mb << 20, "cpu_seconds": int(limits.seconds) + 2}
        with ours:
            try:
                with theirs:
                    socket.send_fds(self._control, [json.dumps(order).encode()], [theirs.fileno()])
                run.send(program.pack(request))
            except OSError as why:
                logger.debug("a zygote was gone: %s", why)
                run.ended = Ended.LOST
            try:
                yield run
            finally:
                self._finish(run)

    def _is_ready(self) -> bool:
        """Whether the zygote is free for a run. Waits until the last child is reaped."""
        if not self._burying:
            return True
        assert self._control is not None
        self._control.settimeout(BURIAL)
        try:
            _status(self._control.recv(1 << 16))
        except (OSError, ValueError) as why:
            logger.warning("a zygote of the sandbox does not answer (%s); it is replaced", why)
            return False
        self._burying = False
        return True

    def _finish(self, run: Run) -> None:
        """If the child has closed its end, wait for it until the deadline; then, or otherwise, have it killed."""
        assert self._control is not None
        try:
            if run.ended is None and run.at_end and (status := self._wait_for_end(run.deadline)) is not None:
                run.ended, run.status = Ended.EXITED, status
                return
            if run.ended is None:
                run.ended = Ended.TIMEOUT if run.at_end else Ended.STOPPED
            self._control.send(b"kill")
            self._burying = True
        except (OSError, ValueError) as why:
            logger.warning("a zygote of the sandbox has ended (%s); it is replaced", why)
            run.ended = run.ended if run.ended in (Ended.TIMEOUT, Ended.OUTPUT) else Ended.LOST
            self._kill()

    def _wait_for_end(self, deadline: float) -> int | None:
        """The child's exit status; None if it has not ended by the deadline."""
        assert self._control is not None
        self._control.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            return _status(self._control.recv(1 << 16))
        except TimeoutError:
            return None

    def close(self) -> None:
        self._closed = True
        self._kill()

    def _kill(self) -> None:
        if self.process is not None:
            kill(self.process)
            self.process = None
        self._burying = False
        if self._control is not None:
            self._control.close()
            self._control = None


def _status(message: bytes) -> int:
    if not message:
        raise ConnectionError("its process has ended")
    return int(json.loads(message)["status"])
