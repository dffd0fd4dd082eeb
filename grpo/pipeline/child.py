"""A stage's process: it ends with this one, and hears when this one is asked to stop. Nothing of torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from grpo.errors import Preempted, RunError, UserError

FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
}
PR_SET_PDEATHSIG = 1
EVERY = 5.0  # seconds
AGAIN = "the same command goes on with it, and finished stages stay"


def run(command: Sequence[str], what: str, tick: Callable[[], None] = lambda: None) -> None:
    """Run a command to its end; ``tick`` is called every few seconds. ``what`` names the stage in messages.

    Raises:
        UserError: it ended with 2, a mistake of the user's, which it has told.
        RunError: it failed, or was killed.
        Preempted, KeyboardInterrupt: this process or that one was asked to stop. The child has ended.
    """
    asked: list[int] = []
    try:
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which hands it on once.
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=_dies_with(os.getpid()))
    except OSError as error:
        raise UserError(f"{what}: {command[0]} cannot be started: {error.strerror or error}") from error

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(FORWARDED[signal.Signals(number)])

    heard = [one for one in FORWARDED if signal.getsignal(one) != signal.SIG_IGN]  # nohup has a terminal's end ignored
    previous: dict[int, Any] = {number: signal.signal(number, forward) for number in heard}
    try:
        code = _wait(child, tick)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signal.SIGINT in asked:
        raise KeyboardInterrupt
    if asked or code == 143:
        raise Preempted(f"{what}: asked to stop; {AGAIN}")
    if code == 2:
        raise UserError(f"{what}: it cannot run as it is, for what is said above. Mend that; {AGAIN}")
    if code:
        raise RunError(f"{what} {_ended(code)}; what it said is above. {AGAIN[0].upper()}{AGAIN[1:]}")


def _wait(child: subprocess.Popen[bytes], tick: Callable[[], None]) -> int:
    while True:
        try:
            return child.wait(EVERY)
        except subprocess.TimeoutExpired:
            tick()
        except BaseException:
            child.kill()
            child.wait()
            raise


def _dies_with(parent: int) -> Callable[[], None]:
    """What a new process does first: have the kernel send it SIGTERM when ``parent`` is gone."""
    libc = ctypes.CDLL(None, use_errno=True)

    def bind() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(143)

    return bind


def _ended(code: int) -> str:
    if code > 0:
        return f"failed with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (where memory runs out, the system does that)" if name == "SIGKILL" else "")
