"""Standard output that takes nothing more: ``| head`` has gone, or the terminal, or the disk is full."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress


def output_is_closed() -> bool:
    """Whether standard output has no reader. From then on it leads nowhere."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file at all
        return False
    asked = select.poll()
    asked.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0)):
        return False
    lead_nowhere()
    return True


def lead_nowhere() -> None:
    """Drop what is printed from now on, so that no later print fails, nor the end of the process."""
    with suppress(OSError, ValueError, AttributeError):  # no file at all
        output, nowhere = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
