"""Files that a trainer on another machine sends to the server, where the two share no disk.

vLLM adds ``Uploads`` to its HTTP server (``--middleware``). What is sent to ``POST /grpo/upload/SET/FILE`` is written
into shared memory, and the answer is the folder of the set, which the workers then read. ``DELETE /grpo/upload/SET``
removes it. This file needs the standard library alone.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from grpo.backends.vllm.scratch import make_scratch

ROUTE = "/grpo/upload/"
NAME = re.compile(r"\w[\w.-]*")

App = Callable[[dict[str, Any], Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class Uploads:
    """ASGI middleware, which passes on all requests but those to ``ROUTE``."""

    def __init__(self, app: App):
        self.app = app
        self.folder = make_scratch(None)  # it goes with this object

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(ROUTE):
            await self.app(scope, receive, send)
            return
        verb, names = scope["method"], scope["path"].removeprefix(ROUTE).split("/")
        status, answer = 404, {"error": f"no such upload: {scope['path']}"}
        if all(NAME.fullmatch(name) for name in names):
            folder = Path(self.folder.name) / names[0]
            if verb == "POST" and len(names) == 2:
                try:
                    if not await _write(folder / names[1], receive):
                        return  # the sender is gone
                    status, answer = 200, {"folder": str(folder)}
                except OSError as error:
                    free = shutil.disk_usage(self.folder.name).free / 1e9
                    status, answer = 507, {"error": f"{folder} of the server has {free:.2f} GB free: {error.strerror}"}
            elif verb == "DELETE" and len(names) == 1:
                shutil.rmtree(folder, ignore_errors=True)
                status, answer = 200, {}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})


async def _write(path: Path, receive: Callable[[], Awaitable[Any]]) -> bool:
    """Write a request's body to a file. False, and no file, where the sender broke off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}")
    try:
        with aside.open("wb") as file:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                file.write(message.get("body", b""))
                if not message.get("more_body"):
                    break
        aside.replace(path)
        return True
    finally:
        aside.unlink(missing_ok=True)
