"""The process that episodes are forked from: it has imported the user's code, once. Standard library only.

A fresh interpreter without CUDA or the trainer's threads. For every episode it is handed one end of a socket and forks
a process that serves it (``process.py``), behind a guard of its own (``rewards.processes``): whatever the episode has
started ends with it. It kills an episode when asked to, and reports how each one ended. It reads nothing that an
episode says but what goes to stdout and stderr, of which it passes on a little.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from grpo.environments.loading import Loaded
from grpo.environments.process import serve as serve_episode
from grpo.errors import UserError
from grpo.user_code import import_ours
from rewards.processes import children_of, die_with_parent, guard, many_files, volunteer_for_death

MAX_MESSAGE = 1 << 17
SHOWN = 1 << 14  # bytes that all episodes of a run may print, together; what is more is dropped
DUMPING = 0.1  # seconds in which a process that hangs may write down where
STACK = 8192  # bytes of a stack dump that are passed on


@dataclass
class _Living:
    """An episode's process, by its guard. ``stacks`` is the file that its stack dumps go to."""

    number: int
    guard: int
    stacks: int
    kill_at: float | None = None


def serve(control_fd: int, parent_pid: int) -> None:
    """Entry point: import what is to be played, say so, then fork what is asked for until the socket closes."""
    die_with_parent(parent_pid)
    for number in (signal.SIGTERM, signal.SIGINT):  # the trainer decides, and ends us by SIGKILL
        signal.signal(number, lambda *_: None)
    volunteer_for_death()
    many_files()
    import_ours()
    control = socket.socket(fileno=control_fd)
    spec, memory_bytes = pickle.loads(control.recv(MAX_MESSAGE))
    output = _catch_output()
    for module in (
        "numpy.random",
        "asyncio",
    ):  # numpy, since its draws are seeded in every episode; both are slow to import
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    try:
        loaded = Loaded(spec)
        loaded.prepare()
    except UserError as why:
        control.send(json.dumps({"refused": str(why)[:60000]}).encode())
        return
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    control.send(json.dumps({"ready": os.getpid()}).encode())
    _Zygote(control, output, loaded, memory_bytes).run()
    os._exit(0)


def _catch_output() -> _Output:
    """Let stdout and stderr of all episodes go to a pipe, and keep what they were."""
    read, write = os.pipe()
    kept = os.dup(2)
    os.dup2(write, 1)
    os.dup2(write, 2)
    os.close(write)
    os.set_blocking(read, False)
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return _Output(read, kept)


@dataclass
class _Output:
    """What episodes print: the first of it goes to the trainer's stderr, the rest nowhere."""

    pipe: int
    kept: int
    shown: int = 0

    def drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.pipe, 1 << 16)
            if self.shown < SHOWN:
                with contextlib.suppress(OSError):
                    os.write(self.kept, data[: SHOWN - self.shown])
                    if self.shown + len(data) > SHOWN:
                        os.write(self.kept, b"\n[environments print more than is shown here]\n")
            self.shown += len(data)


class _Zygote:
    def __init__(self, control: socket.socket, output: _Output, loaded: Loaded, memory_bytes: int | None) -> None:
        self.control, self.output, self.loaded, self.memory_bytes = control, output, loaded, memory_bytes
        self.living: dict[int, _Living] = {}  # by the pid of the guard
        self.guards: dict[int, int] = {}  # by the episode's number

    def run(self) -> None:
        """Until the trainer closes its end."""
        read, write = os.pipe()
        for end in (read, write):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        poll = select.poll()
        for fd in (self.control.fileno(), self.output.pipe, read):
            poll.register(fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._patience())}
            if self.output.pipe in ready:
                self.output.drain()
            if read in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(read, 4096)
            self._kill_those_due()
            self._bury()
            if self.control.fileno() in ready and not self._obey():
                return

    def _patience(self) -> float | None:
        """Milliseconds until the next one is to be killed."""
        due = [living.kill_at for living in self.living.values() if living.kill_at is not None]
        return max(0.0, min(due) - time.monotonic()) * 1000 if due else None

    def _obey(self) -> bool:
        """Do what the trainer asks for; False where it has gone."""
        data, fds, _, _ = socket.recv_fds(self.control, MAX_MESSAGE, 1)
        if not data:
            return False
        asked = json.loads(data)
        if fds:
            self._fork(asked["number"], asked["seed"], fds[0])
        elif (pid := self.guards.get(asked["number"])) is not None:
            self._kill(self.living[pid], dump=asked["dump"])
        return True

    def _fork(self, number: int, seed: int, channel: int) -> None:
        stacks = os.memfd_create("stacks")
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as why:
            os.close(channel)
            os.close(stacks)
            self._say({"ended": number, "how": f"cannot be started: {why}", "stacks": ""})
            return
        if pid == 0:
            self._become_episode(zygote, seed, channel, stacks)
        os.close(channel)
        self.living[pid] = _Living(number, pid, stacks)
        self.guards[number] = pid
        self._say({"begun": number, "guard": pid})

    def _become_episode(self, zygote: int, seed: int, channel: int, stacks: int) -> None:
        """The forked process. Ends in ``os._exit``, whatever happens."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for of_signal in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(of_signal, signal.SIG_DFL)
            self.control.close()
            for living in self.living.values():
                os.close(living.stacks)
            os.close(self.output.pipe)
            os.close(self.output.kept)
            parent = guard(zygote)  # the guard stays in there
            die_with_parent(parent)
            serve_episode(socket.socket(fileno=channel), self.loaded, seed, stacks, self.memory_bytes)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(0)

    def _kill(self, living: _Living, *, dump: bool) -> None:
        """End an episode; with ``dump`` it is first asked to write down where it is."""
        if living.kill_at is None:
            living.kill_at = time.monotonic() + (DUMPING if dump else 0.0)
            if dump:
                _signal(living, signal.SIGUSR1)

    def _kill_those_due(self) -> None:
        now = time.monotonic()
        for living in self.living.values():
            if living.kill_at is not None and living.kill_at <= now:
                _signal(living, signal.SIGKILL)
                living.kill_at = now + DUMPING  # it may have been started only now

    def _bury(self) -> None:
        """Report the episodes that have ended. Their guards have ended all that they left behind."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                living = self.living.pop(pid, None)
                if living is None:
                    continue
                del self.guards[living.number]
                stacks = os.pread(living.stacks, STACK, 0).decode(errors="replace")
                os.close(living.stacks)
                self._say({"ended": living.number, "how": _how(os.waitstatus_to_exitcode(status)), "stacks": stacks})

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.control.send(json.dumps(message).encode())


def _signal(living: _Living, number: int) -> None:
    """Signal the episode behind a guard, its oldest child."""
    for pid in children_of(living.guard)[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exited with status {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"
