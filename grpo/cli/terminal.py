"""What commands print. Nothing in it can steer the terminal, wherever it came from."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from grpo.errors import printable


def tell(text: Any, *, nl: bool = True, err: bool = False) -> None:
    """Print a text to standard output (or standard error)."""
    typer.echo(printable(str(text)), nl=nl, err=err)


class StderrHandler(logging.StreamHandler):
    """Writes to the current ``sys.stderr``: a progress display replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
