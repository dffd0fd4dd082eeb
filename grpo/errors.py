"""Errors whose message is meant for a person; any other exception is a bug and keeps its traceback."""

from __future__ import annotations


class UserError(Exception):
    """The recipe, the data or the command line is wrong. The CLI prints the message alone and exits 2."""


class RunError(Exception):
    """A run could not go on (non-finite loss, a reward that fails too often). Message alone, exit 1."""


class Preempted(BaseException):
    """The machine is needed elsewhere (SIGTERM); the run stops, and has saved what it had. Exit 143.

    A signal may raise it anywhere, in a library's import too. So, like KeyboardInterrupt, it passes by what catches
    Exception.
    """


class BackendFailed(RunError):
    """The backend is gone for good, or does not hold the policy. The trainer saves a checkpoint before it ends."""
