"""Errors whose message is meant for a person; any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import re

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and newline, marks that turn the direction of text, and halves of a character."""


def printable(text: str) -> str:
    """The text with control characters as escapes (``\\x1b``). A message may quote a model, and a model may write what
    a terminal obeys."""
    return STEERING.sub(lambda found: ascii(found.group())[1:-1], text)


def first_line(error: BaseException) -> str:
    """What an error says, in one line; of one that says nothing, its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """The recipe, the data or the command line is wrong. The CLI prints the message alone and exits 2."""


class RunError(Exception):
    """A run could not go on (non-finite loss, a reward that fails too often). Message alone, exit 1."""


class Preempted(BaseException):
    """The machine is needed elsewhere (SIGTERM), or a person pressed Ctrl-C; the run stops, and has saved what it had.
    Exit 143, or 130 after Ctrl-C.

    A signal may raise it anywhere, in a library's import too. So, like KeyboardInterrupt, it passes by what catches
    Exception.
    """

    def __init__(self, text: str, code: int = 143):
        super().__init__(text)
        self.code = code


class BackendFailed(RunError):
    """The backend is gone for good, or does not hold the policy. The trainer saves a checkpoint before it ends."""
