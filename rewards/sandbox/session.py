"""A Python session in the sandbox, seen from outside: pieces of code one after the other, which share their variables.

Between two pieces the session stands still, whatever threads it has left. It ends where a piece takes too long, or ends
its process (``os._exit``, a crash, the kernel's killer); the next piece then begins a new one, and is told so.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass

from rewards.sandbox.pool import Ended, Limits, Run, Sandbox
from rewards.sandbox.program import Request


@dataclass(frozen=True)
class Said:
    """What came of a piece of code: its output (``left_out`` characters more were cut off), and its error, empty where
    nothing was raised. ``ended``: the session did not outlive it, and why."""

    output: str
    error: str = ""
    left_out: int = 0
    ended: str = ""


class Session:
    """Runs code in a place of ``sandbox`` that is its own until it is closed.

    ``limits.seconds`` are for one piece of code, and ``max_calls`` times as much CPU time is all that a session has.
    ``limits.max_output`` is in characters, for one piece.
    """

    def __init__(self, sandbox: Sandbox, limits: Limits, max_calls: int = 32) -> None:
        self.sandbox, self.limits, self.max_calls = sandbox, limits, max_calls
        self._held = ExitStack()
        self._run: Run | None = None
        self._number = 0  # of the session's latest piece of code
        self._why = ""

    def run(self, code: str) -> Said:
        """Run a piece of code. Raises SandboxUnavailable where no session can be started."""
        if self._run is None:
            self._run = self._started()
        # JSON takes up to 12 characters for one (a surrogate pair), for the output and for the error
        self._run.max_output = 24 * self.limits.max_output + 4096
        self._run.go_on(self.limits.seconds)
        self._run.send(json.dumps(code).encode() + b"\n")
        self._number += 1
        while (line := self._run.line()) is not None:
            if (said := _read(line, self._number)) is not None:
                self._run.hold()
                return said
        self.close()
        return Said("", ended=self._why)

    def _started(self) -> Run:
        self._number = 0
        seconds = self.limits.seconds * self.max_calls
        limits = Limits(seconds, self.limits.memory_mb, self.limits.max_output)
        return self._held.enter_context(self.sandbox.run(Request("session", "", str(self.limits.max_output)), limits))

    def close(self) -> None:
        """End the session. The next ``run`` begins a new one."""
        run, self._run = self._run, None
        self._held.close()
        if run is not None:
            self._why = _why(run, self.limits)


def _read(line: bytes, number: int) -> Said | None:
    """What a line says of the piece of this number; None where it is no answer to that. It may be the program's own,
    and say anything: all of it is only text."""
    try:
        said = json.loads(line)
        answers = said["number"] == number
        return Said(str(said["output"]), str(said["error"]), int(said["left_out"])) if answers else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _why(run: Run, limits: Limits) -> str:
    if run.ended is Ended.TIMEOUT:
        return f"it ran for more than {limits.seconds:g} seconds"
    if run.ended is Ended.OUTPUT:
        return "it wrote too much"
    if run.status in (-24, -9):
        return "it used up its CPU time or memory"
    if run.status is not None and run.status < 0:
        return f"it crashed (signal {-run.status})"
    return "it ended its process"
