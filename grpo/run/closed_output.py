"""Standard output that nobody reads any more: ``| head`` has gone, or the terminal."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def output_is_closed() -> bool:
    """Whether what was last printed could not be delivered. From then on standard output leads nowhere, so that no
    later print fails, nor the end of the process."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return True
    return False
