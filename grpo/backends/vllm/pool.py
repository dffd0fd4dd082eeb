"""The servers that this process generates with. A thread of its own balances requests over those that are up."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import aiohttp

from grpo.backends.vllm.api import UNIX, UNLABELLED, Server, ServerGone

log = logging.getLogger("grpo")
T = TypeVar("T")

MAX_IN_FLIGHT = 512  # requests open on one server at once. vLLM runs no more by default, and sockets are finite.
# Seconds that a connection may wait for its next request. A server closes idle ones too (serve.py: after 60 seconds, by
# itself after 5), and a request that is written to one just then looks as if the server had broken off.
IDLE = 3.0


@dataclass(frozen=True)
class Lost:
    """Stands for a completion that no server is left to make. ``why`` is the last error."""

    why: str


Came = tuple[int, Any] | None  # a payload's place and its answer, or Lost; None after the last


@dataclass(frozen=True)
class Answers:
    """Iterating gives each payload's place and answer, or ``Lost``, in the order in which they end.

    It raises what ``Server.generate`` raises.
    """

    asked: Future[None]
    came: SimpleQueue[Came]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        while (answer := self.came.get()) is not None:
            yield answer
        self.asked.result()


class Pool:
    """Talks to servers from a thread with an event loop, so that requests go on while the caller does something else.

    A server that breaks off or passes a deadline is down. Its requests go to the others at once. It gets no request
    until the backend has given it weights again and calls ``up``.
    """

    def __init__(self, urls: list[str], generation_timeout: float):
        self.generation_timeout = generation_timeout
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="vllm requests", daemon=True)
        self.thread.start()
        self.servers = [Server(url, self.run(open_session(url))) for url in urls]
        self.down: dict[str, str] = dict.fromkeys(urls, "not yet reached")
        self._outstanding = dict.fromkeys(urls, 0)
        self._slots = {url: asyncio.Semaphore(MAX_IN_FLIGHT) for url in urls}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine, awaited in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def submit(self, payloads: list[dict[str, Any]]) -> Answers:
        """Ask for all of them now."""
        return self.begin([self.ask(payload) for payload in payloads])

    def begin(self, works: list[Coroutine[Any, Any, Any]]) -> Answers:
        """Await all of these in the pool's thread, side by side."""
        came: SimpleQueue[Came] = SimpleQueue()
        return Answers(asyncio.run_coroutine_threadsafe(self._all(works, came), self.loop), came)

    def live(self) -> list[Server]:
        return [server for server in self.servers if server.url not in self.down]

    def mark_down(self, server: Server, why: str) -> None:
        if server.url not in self.down:
            log.warning("vllm server %s is lost: %s", server.url, why)
        self.down[server.url] = why

    def lose(self, down: dict[str, str]) -> None:
        """Mark servers down that another process has lost."""
        for server in self.servers:
            if server.url in down:
                self.mark_down(server, down[server.url])

    def up(self, urls: list[str]) -> None:
        """Exactly these servers are up."""
        self.down = {s.url: self.down.get(s.url, "not reached") for s in self.servers if s.url not in urls}

    def last_error(self) -> str:
        return "; ".join(f"{url}: {why}" for url, why in self.down.items()) or "none"

    def close(self) -> None:
        self.run(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _stop(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        for server in self.servers:
            await server.session.close()

    async def _all(self, works: list[Coroutine[Any, Any, Any]], came: SimpleQueue[Came]) -> None:
        async def one(place: int, work: Coroutine[Any, Any, Any]) -> None:
            came.put((place, await work))

        tasks = [asyncio.ensure_future(one(i, work)) for i, work in enumerate(works)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        finally:
            came.put(None)

    async def ask(self, payload: dict[str, Any]) -> dict[str, Any] | Lost:
        """A server's answer. Where one is lost, the next is asked."""
        while live := self.live():
            server = min(live, key=lambda s: self._outstanding[s.url])
            self._outstanding[server.url] += 1
            try:
                async with self._slots[server.url]:
                    if server.url in self.down:
                        continue
                    answer = await server.generate(payload, self.generation_timeout)
                if any(span["version"] == UNLABELLED for span in answer["weight_versions"]):
                    raise ServerGone("it was started again and holds weights that did not come from this run")
                return answer
            except ServerGone as why:
                self.mark_down(server, str(why))
            finally:
                self._outstanding[server.url] -= 1
        return Lost(self.last_error())


async def open_session(url: str) -> aiohttp.ClientSession:
    """Connections to one server. Each serves one request at a time, and then the next."""
    kept: dict[str, Any] = {"limit": 0, "keepalive_timeout": IDLE}  # MAX_IN_FLIGHT is the limit
    connector: aiohttp.BaseConnector = (
        aiohttp.UnixConnector(path=url.removeprefix(UNIX), **kept)
        if url.startswith(UNIX)
        else aiohttp.TCPConnector(**kept)
    )
    return aiohttp.ClientSession(connector=connector, trust_env=False)
