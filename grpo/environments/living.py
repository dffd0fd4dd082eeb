"""An episode's process as the warden knows it, and how it fails."""

from __future__ import annotations

import socket
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class EpisodeFailed(Exception):
    """An episode's process failed. ``cause`` is ``timeout``, ``crashed``, ``memory`` or ``error``; of one that could
    not be loaded, ``refused``."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass
class Call:
    what: str
    data: bytes
    future: Future[Any] = field(default_factory=Future)


@dataclass
class Living:
    """An episode's process as the warden knows it. ``calls`` are those not answered; the first one is under way.

    ``deadline`` is when the call under way is late, or where ``failure`` or ``closing`` is set, when the process must
    be gone.
    """

    number: int
    channel: socket.socket
    timeout: float
    calls: deque[Call] = field(default_factory=deque)
    deadline: float | None = None
    began: float = 0.0
    unsent: bytes = b""
    received: bytearray = field(default_factory=bytearray)
    guard: int | None = None
    failure: EpisodeFailed | None = None
    closing: bool = False
    listens: bool = False
