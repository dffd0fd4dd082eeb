"""A fake of a vLLM server, for tests of what grpo asks and how it takes the answers: no model, no engine, only HTTP."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

Body = dict[str, Any]
Answer = Any  # what is sent as JSON with status 200, or (status, that)

GENERATE = "/inference/v1/generate"


class FakeServer:
    """NOT vLLM: answers the routes of ``api.py`` from a thread of its own, in the shapes that vLLM has, as it is told.

    A completion is two tokens that follow from the request's seed, labelled ``label``. ``gate`` closed keeps requests
    for completions waiting, ``waits`` those of which it is true; ``routes`` replaces what is answered; ``asked`` is
    what came, over ``connections``. ``die`` breaks off everything that is open, ``start`` listens again on the same
    port, or on the Unix socket ``at``.
    """

    def __init__(self, label: str = "0", at: Path | None = None):
        self.label = label
        self.asked: list[tuple[str, Body]] = []
        self.routes: dict[str, Callable[[Body], Answer]] = {GENERATE: self.completion}
        self.open = self.most_open = 0
        self.gate = threading.Event()
        self.gate.set()
        self.waits: Callable[[Body], bool] = lambda _: False
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.at = at
        self.url = f"unix:{at}" if at else f"http://127.0.0.1:{self.port}"
        self.connections: set[Any] = set()
        self.queries: list[tuple[str, str]] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.runner: web.AppRunner | None = None
        self.start()

    def start(self) -> None:
        self._run(self._listen())

    def die(self) -> None:
        self._run(self._break_off())

    def close(self) -> None:
        self.die()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def seeds(self) -> list[int]:
        """The seeds of the completions that it was asked for."""
        return [body["sampling_params"]["seed"] for path, body in self.asked if path == GENERATE]

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def completion(self, body: Body) -> Answer:
        seed = body["sampling_params"]["seed"]
        choice = {
            "token_ids": [seed % 100, seed % 100 + 1],
            "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -0.25}]},
            "finish_reason": "stop",
            "weight_versions": [{"start": 0, "end": 2, "version": self.label}],
        }
        return {"model": body.get("model", "base"), "choices": [choice]}

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {}
        self.asked.append((request.path, body))
        self.queries.append((request.path, request.query_string))
        self.connections.add(request.transport)
        if request.path == GENERATE:
            self.open += 1
            self.most_open = max(self.open, self.most_open)
            try:
                while not self.gate.is_set() or self.waits(body):
                    await asyncio.sleep(0.002)
            finally:
                self.open -= 1
        answer = self.routes.get(request.path, lambda _: {})(body)
        status, content = answer if isinstance(answer, tuple) else (200, answer)
        return (
            web.Response(text=content, status=status)
            if isinstance(content, str)
            else web.json_response(content, status=status)
        )

    async def _listen(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.05)  # 0 would wait for ever
        await self.runner.setup()
        if self.at is not None:
            await web.UnixSite(self.runner, self.at).start()
        else:
            await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def _break_off(self) -> None:
        if self.runner is None:
            return
        for site in list(self.runner.sites):
            await site.stop()
        for connection in list(self.runner.server.connections):  # type: ignore[union-attr]
            if connection.transport is not None:
                connection.transport.abort()
        await self.runner.cleanup()
        self.runner = None

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)
