"""What the trainer and an episode's process say to each other. Standard library only.

An episode's process gets pickled requests, ``(what, argument)``. It answers in JSON: the user's code runs there, and
the trainer never unpickles anything that comes from it. Both are framed by their length.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from typing import Any

LENGTH = struct.Struct("!I")
MAX_TEXT = 100_000  # characters of one observation; what is longer is cut where it is made
MAX_ANSWER = 32 << 20  # bytes; a process that says more is ended
CUT = "\n[... {} characters left out ...]\n"


class Garbled(ValueError):
    """Bytes from an episode's process that are no answer."""


def frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


def request(what: str, argument: Any = None) -> bytes:
    return frame(pickle.dumps((what, argument)))


def receive(channel: socket.socket) -> tuple[str, Any]:
    """The next request. Raises EOFError where the trainer has closed its end."""
    (length,) = LENGTH.unpack(_exactly(channel, LENGTH.size))
    return pickle.loads(_exactly(channel, length))


def _exactly(channel: socket.socket, length: int) -> bytes:
    parts = []
    while length:
        part = channel.recv(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def answer(value: Any) -> bytes:
    return frame(json.dumps({"ok": value}).encode())


def failure(cause: str, message: str) -> bytes:
    return frame(json.dumps({"failure": cause, "message": message}).encode())


def take_answer(buffer: bytearray) -> dict[str, Any] | None:
    """Take an answer off a buffer; None where it is not whole yet. Raises Garbled where it is none."""
    if len(buffer) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack_from(buffer)
    if length > MAX_ANSWER:
        raise Garbled(f"it sent an answer of {length:,} bytes, more than {MAX_ANSWER:,}")
    end = LENGTH.size + length
    if len(buffer) < end:
        return None
    data = bytes(buffer[LENGTH.size : end])
    del buffer[:end]
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not ({"ok", "failure"} & found.keys()):
        raise Garbled(f"it sent {data[:60]!r}, which is no answer")
    return found


def cut(text: str) -> str:
    """A text of at most ``MAX_TEXT`` characters: the middle of a longer one is left out, and it says so."""
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return text[:half] + CUT.format(len(text) - 2 * half) + text[-half:]
