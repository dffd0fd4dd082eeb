"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``path`` aside and rename it: a reader sees the old content or the new, never a part.

    Text is written as UTF-8; a lone surrogate, which UTF-8 has no bytes for, is written as its escape (``\\udc80``).
    Raises OSError where the disk refuses; ``path`` is then as it was, and nothing is left beside it.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
