"""Standard output that nobody reads any more: ``| head`` has gone, or the terminal."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress


def output_is_closed() -> bool:
    """Whether standard output has no reader. From then on it leads nowhere, so that no later print fails, nor the end
    of the process."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file at all
        return False
    asked = select.poll()
    asked.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0)):
        return False
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output)
        os.close(nowhere)
    return True
