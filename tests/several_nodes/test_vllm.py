"""Two nodes that train, and a vLLM server on a third which shares no memory with them: weights travel over HTTP."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import DDP, ROOT, environment
from tests.network import Node, launch, network
from tests.several_nodes.test_runs import ended
from tests.vllm_engine.conftest import SMALL_CACHE, TINY, vllm_python
from tests.vllm_engine.runs import metrics, recipe, rollouts, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "GRPO_VLLM_PYTHON" not in os.environ, reason="GRPO_VLLM_PYTHON does not name a Python with vLLM"
    ),
]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """Two nodes without a server, beside one with."""
    log = tmp_path_factory.mktemp("server") / "log"
    with network("node-a", "node-b", "node-c") as nodes:
        arguments = ["--host=0.0.0.0", "--port=8000", "--dtype=float32", "--max-model-len=128", *SMALL_CACHE]
        adapters = ["--enable-lora", "--max-lora-rank=8", "--max-loras=2"]
        command = [f"{ROOT}/launch/vllm_serve.sh", str(TINY), *arguments, *adapters]
        variables = {"VLLM_PYTHON": vllm_python(), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        server = nodes[2].start("sh", "-c", f'exec "$@" > {log} 2>&1', "sh", *command, env=environment() | variables)
        wait_for(lambda: "Application startup complete" in log.read_text() if log.exists() else False, server, 300)
        yield nodes[:2]


@pytest.mark.parametrize("model", [{}, {"lora": {"r": 4}}], ids=["whole", "adapters"])
def test_a_server_on_a_third_node(tmp_path: Path, trainers: list[Node], model: dict[str, object]) -> None:
    folder = tmp_path / "run"
    rollout = {"vllm_mode": "server", "vllm_server_base_url": "http://node-c:8000"}
    path = recipe(folder, model=model, rollout=rollout | ({"vllm_lora_sync": "adapter"} if model else {}))
    done = ended(launch(trainers, DDP, "-m", "grpo", "train", path), 400)
    assert [code for code, _ in done] == [0, 0], done
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3]
    for row in metrics(folder):
        assert row["sampling/probe_logp_difference/mean"] < 1e-4
        assert row["grad_norm"] > 0
        assert {v for r in rollouts(folder, row["step"]) for _, _, v in r["versions"]} == {row["step"] - 1}
