"""What commands print. Nothing in it can steer the terminal, wherever it came from."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from grpo.errors import RunError, printable
from grpo.run.closed_output import lead_nowhere


def tell(text: Any, *, nl: bool = True, err: bool = False) -> None:
    """Print a text to standard output (or standard error). Raises RunError where it takes none: a full disk."""
    with output_taken():
        typer.echo(printable(str(text)), nl=nl, err=err)


@contextmanager
def output_taken() -> Iterator[None]:
    """What prints. Raises RunError where standard output takes nothing; BrokenPipeError passes: nobody listens."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        lead_nowhere()
        raise RunError(f"standard output cannot be written: {error.strerror}") from error


class StderrHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``: a progress display replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
