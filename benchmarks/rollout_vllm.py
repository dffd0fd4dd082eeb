"""A vLLM server for ``rollout``: started as a user would, asked over HTTP, stopped while others have their turn."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.common import ROOT
from grpo.backends.base import Request, Sampling
from grpo.backends.vllm.api import Server
from grpo.backends.vllm.completions import generate_payload

CACHE = 2_000_000_000  # bytes of keys and values
START = 240.0  # seconds


@contextmanager
def vllm_server(
    options: Any, threads: int, folder: Path, eos: int
) -> Iterator[Callable[[list[Request], int], list[int]]]:
    """Yields a function that samples completions and returns their lengths. Between calls, the server is stopped."""
    with started(options, threads, folder, longest=256 + options.length) as (url, going):

        def way(requests: list[Request], length: int) -> list[int]:
            with going():
                return asyncio.run(_sample(url, requests, length, eos))

        yield way


@contextmanager
def started(
    options: Any, threads: int, folder: Path, *, longest: int
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
    """Yields a server's URL, and within what it runs; outside of that it is stopped. ``longest``: prompt and completion
    together, in tokens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [f"--port={port}", f"--dtype={options.dtype}", f"--max-model-len={longest}"]
    arguments += [f"--kv-cache-memory-bytes={CACHE}"]
    process = subprocess.Popen(
        [str(ROOT / "launch/vllm_serve.sh"), options.model, *arguments, *options.vllm_args],
        env=os.environ
        | {
            "VLLM_PYTHON": str(Path(options.vllm_python).absolute()),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        },
        stdout=(folder / f"vllm_{threads}.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    @contextmanager
    def going() -> Iterator[None]:
        os.killpg(process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGSTOP)

    try:
        _wait_until_up(process, port, folder / f"vllm_{threads}.log")
        os.killpg(process.pid, signal.SIGSTOP)
        yield f"http://127.0.0.1:{port}", going
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def vllm_version(python: str) -> str:
    code = "from grpo.backends.vllm.serve import installed_version; print(installed_version())"
    return subprocess.check_output([python, "-c", code], cwd=ROOT, text=True).strip()


def _wait_until_up(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not come up:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.5)


async def _sample(url: str, requests: list[Request], length: int, eos: int) -> list[int]:
    """Asks for all completions at once, one request each, as the vllm backend does."""
    payloads = [
        generate_payload(r.prompt.token_ids, key, Sampling(length), [eos], version=0, model=None)
        for r in requests
        for key in r.keys
    ]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        server = Server(url, session)
        answers = await asyncio.gather(*(server.generate(payload, 600.0) for payload in payloads))
    return [len(answer["token_ids"]) for answer in answers]
