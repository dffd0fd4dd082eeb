"""Processes in which environments live, one an episode, forked from one that has imported the user's code.

``warden.py`` speaks with them, ``zygote.py`` forks them, ``process.py`` is one of them.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from grpo.environments.living import EpisodeFailed, Living
from grpo.environments.loading import About, Spec
from grpo.environments.warden import MAX_MESSAGE, Warden
from grpo.errors import RunError, UserError
from rewards.processes import how_it_ended, kill, many_files, start_python, worker_pid

ZYGOTE = "grpo.environments.zygote"
START_TIMEOUT = 300.0  # seconds; an environment may import torch from a cold network disk
STARTS = 4  # of the zygote, each within as many episodes as FORGIVEN
FORGIVEN = 1000
# Hashes of text are the same in every run. Arenas of malloc would count as memory that is taken.
VARIABLES = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a fork would not have numpy's


class World:
    """The process of one episode. Calls are answered in their order, and end within the time limit of each."""

    def __init__(self, warden: Warden, living: Living) -> None:
        self._warden, self._living = warden, living

    def ask(self, what: str, argument: Any = None) -> Future[Any]:
        """Have a method of ``process._Episode`` called. Returns at once; the future raises ``EpisodeFailed``."""
        return self._warden.ask(self._living, what, argument)

    def close(self) -> None:
        """The episode is over. Returns at once; may be called twice."""
        self._warden.end(self._living)


class Worlds:
    """``open`` forks a process for an episode; ``about`` says what the environment is. Close it, or use ``with``.

    ``timeout`` is how many seconds a call may take, ``memory_gb`` how much an episode's process may take beside what
    imports took. Of the variables that look like secrets, they get those in ``keep``.

    Raises:
        UserError: the environment cannot be imported or constructed, or is none; every problem, with file and line.
    """

    def __init__(self, spec: Spec, *, timeout: float, memory_gb: float | None, keep: Sequence[str] = ()) -> None:
        if sys.platform != "linux":
            raise UserError("environment: its processes are forked and guarded as only Linux can; run it there")
        many_files()
        self._spec, self._timeout, self._keep = spec, timeout, keep
        self._memory_bytes = None if memory_gb is None else int(memory_gb * 2**30)
        self._zygote: subprocess.Popen[bytes] | None = None
        self._starts = self._numbers = self._numbers_at_start = 0
        self._lock = threading.Lock()
        self._warden = Warden(self._memory_bytes)
        try:
            self._start()
            self.about = self._try_out()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """Of the process that episodes are forked from."""
        return worker_pid(self._zygote) if self._zygote else None

    def open(self, seed: int) -> World:
        """Fork a process for an episode, whose draws are seeded with ``seed``. Returns at once.

        Raises:
            RunError: the process that they are forked from ends again and again.
        """
        with self._lock:
            if not self._warden.has_zygote:
                self._start_again()
            self._numbers += 1
            return World(self._warden, self._warden.begin(self._numbers, seed, self._timeout))

    def close(self) -> None:
        """End all processes, whatever they are doing. May be called twice."""
        self._warden.stop()
        if self._zygote is not None:
            kill(self._zygote)

    def _start_again(self) -> None:
        assert self._zygote is not None
        how = how_it_ended(self._zygote, 1.0)
        kill(self._zygote)
        if self._numbers - self._numbers_at_start > FORGIVEN:
            self._starts = 0
        if self._starts >= STARTS:
            raise RunError(
                f"environment: the process that episodes are forked from {how}, {self._starts} times now; does "
                f"{self._spec.source or 'a tool'} start threads when it is imported, or kill its parent?"
            )
        try:
            self._start()
        except UserError as why:
            raise RunError(f"environment: the process that episodes are forked from {how}, and now: {why}") from None

    def _start(self) -> None:
        """Start the zygote and wait until it has imported everything. Raises UserError where it cannot."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._starts += 1
        self._numbers_at_start = self._numbers
        variables = VARIABLES | {name: "1" for name in THREADS if name not in os.environ}
        with theirs:
            try:
                self._zygote = start_python(ZYGOTE, (theirs.fileno(),), keep=self._keep, variables=variables)
            except OSError as why:
                raise UserError(f"environment: cannot start a process: {why}") from None
        try:
            ours.send(pickle.dumps((self._spec, self._memory_bytes)))
            ours.settimeout(START_TIMEOUT)
            said = ours.recv(MAX_MESSAGE)
            ours.settimeout(None)
        except TimeoutError:
            raise UserError(f"environment: importing it took longer than {START_TIMEOUT:g} s") from None
        except OSError:
            said = b""
        if not said:
            raise UserError(f"environment: the process that imports it {how_it_ended(self._zygote, 1.0)}")
        found = json.loads(said)
        if "refused" in found:
            raise UserError(found["refused"])
        self._warden.take(ours)

    def _try_out(self) -> About:
        world = self.open(0)
        try:
            return About(**world.ask("try_out").result())
        except EpisodeFailed as why:
            if why.cause == "refused":
                raise UserError(str(why)) from None
            raise UserError(f"environment: {self._spec.source}: its constructor: {why}") from None
        finally:
            world.close()

    def __enter__(self) -> Worlds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
