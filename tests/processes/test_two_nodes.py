"""One run over two nodes; `make test-nodes` has the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.launching import ROOT
from tests.network import launch, network
from tests.resuming import command


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_nodes_meet_and_a_lost_one_ends_the_other(tiny_model: Path, tmp_path: Path) -> None:
    """By the launch file, and the first node's name, which is a loopback address there, as on Debian."""
    folder = tmp_path / "run"
    with network("node-a", "node-b") as nodes:
        arguments = command(tiny_model, folder, "rollout.max_completion_length=4", "evaluation.at_start=false")
        first, second = launch(nodes, ["--config_file", f"{ROOT}/launch/ddp.yaml"], *arguments)
        while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
            assert first.poll() is None, first.communicate()[0]
            assert second.poll() is None, second.communicate()[0]
            time.sleep(0.05)
        nodes[1].kill()
        said = first.communicate(timeout=60)[0]
    assert first.returncode == 1
    assert "rank 1 (on node-b) was lost in step " in said
    assert "Start all of them again with --resume." in said
