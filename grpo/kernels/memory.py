"""Where torch's CPU tensors stand in memory (``allocator.cpp``): of what a process holds, little lies free."""

from __future__ import annotations

import logging
from ctypes import CDLL, c_size_t
from functools import cache
from pathlib import Path

from grpo.kernels import native

log = logging.getLogger("grpo")
SOURCE = Path(__file__).with_name("allocator.cpp")


@cache
def install() -> CDLL | None:
    """From now on, for the whole process. None where it can't be compiled; a line in the log then says why."""
    try:
        compiled = native.library(SOURCE, with_torch=True)
    except native.CannotCompile as error:
        log.info("memory: the C library's allocator, which keeps more than is used: %s", error)
        return None
    compiled.bytes_used.restype = compiled.bytes_free.restype = c_size_t
    compiled.install()
    return compiled


def trim() -> None:
    """Give back to the system now what is free, so that it counts among what the machine has left."""
    if install.cache_info().currsize and (compiled := install()):
        compiled.trim()
