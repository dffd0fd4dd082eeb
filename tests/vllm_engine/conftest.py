"""Real engines for the tests of the vLLM backend: `make test-vllm` says which Python has vLLM. Nothing is skipped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny_base"
SMOLLM2 = ROOT / "models" / "smollm2-135m"
SECONDS_TO_START = 180
SMALL_CACHE = ["--kv-cache-memory-bytes=200000000", "--enforce-eager"]


def vllm_python() -> str:
    python = os.environ.get("GRPO_VLLM_PYTHON")
    assert python, "GRPO_VLLM_PYTHON is not set: run these tests by `make test-vllm`"
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class ServerProcess:
    """``launch/vllm_serve.sh`` as a user starts it; can be killed, stopped and started again on the same port."""

    model: Path
    arguments: list[str]
    log: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> ServerProcess:
        environment = os.environ | {"VLLM_PYTHON": vllm_python(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(ROOT / "launch/vllm_serve.sh"), str(self.model), f"--port={self.port}", *self.arguments],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait(self) -> ServerProcess:
        deadline = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(self.url + "/health", timeout=2)
            except OSError:
                time.sleep(0.3)
            else:
                return self
        raise AssertionError(f"the server did not start in {SECONDS_TO_START} s:\n{self.log.read_text()[-3000:]}")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def serve(model: Path, folder: Path, *arguments: str, dtype: str = "float32", length: int = 512) -> ServerProcess:
    """A server that is starting; ``wait`` for it."""
    log = folder / f"server_{free_port()}.log"
    return ServerProcess(
        model, [f"--dtype={dtype}", f"--max-model-len={length}", *SMALL_CACHE, *arguments], log
    ).start()


@pytest.fixture(scope="session")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    extension = "tests.vllm_engine.perturbing_worker.PerturbingWorkerExtension"
    server = serve(
        TINY,
        tmp_path_factory.mktemp("tiny_server"),
        f"--worker-extension-cls={extension}",
        '--weight-transfer-config={"backend": "ipc"}',
    )
    yield server.wait()
    server.kill()
