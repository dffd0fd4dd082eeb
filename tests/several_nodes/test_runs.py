"""Runs over two nodes that share a disk and a network: equal to one process's, and exact after a node is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launching import DDP, FSDP2, run_python
from tests.network import Node, launch, network
from tests.resuming import command, lines, size, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHORT = ("training.max_steps=12", "training.eval_every=0", "rollout.max_completion_length=8")
PATIENCE = 6
QUICK = (*SHORT, f"training.peer_timeout={PATIENCE}")
HSDP = [  # over nodes whole copies, over a node's processes a copy's parts
    *FSDP2,
    "--use_parallelism_config",
    "--parallelism_config_dp_replicate_size=2",
    "--parallelism_config_dp_shard_size=2",
]
LAUNCHER = 15  # seconds that accelerate's launcher may take to end after its process


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    with network("node-a", "node-b") as made:
        yield made


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = run_python(*command(tiny_model, folder, *SHORT))
    assert done.returncode == 0, done.stderr
    return folder


def ended(processes: list[subprocess.Popen[str]], seconds: float = 200) -> list[tuple[int, str]]:
    """Exit code and output of each process."""
    deadline = time.monotonic() + seconds
    said = [process.communicate(timeout=deadline - time.monotonic())[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def wait_for_steps(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until a checkpoint was written and a step has followed it."""
    enough = float("inf")
    while size(folder) <= enough:
        assert process.poll() is None, process.communicate()[0]
        if enough == float("inf") and list(folder.glob("checkpoints/step_*[0-9]")):
            enough = size(folder)
        time.sleep(0.02)


def same_but_for_rounding(one: Path, other: Path) -> None:
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a == pytest.approx(b, rel=5e-3, abs=1e-4)
    a, b = (AutoModelForCausalLM.from_pretrained(folder / "final").state_dict() for folder in (one, other))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "per_node", "lost", "how"),
    [(DDP, 2, 1, "kill"), (DDP, 1, 0, "kill"), (FSDP2, 1, 1, "cut"), (HSDP, 2, 0, "kill")],
    ids=["ddp-killed", "ddp-first-killed", "fsdp2-cut", "hsdp-first-killed"],
)
def test_the_run_of_two_nodes_is_that_of_one_and_exact_after_one_is_lost(
    tiny_model: Path, tmp_path: Path, alone: Path, kind: list[str], per_node: int, lost: int, how: str
) -> None:
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    with network("node-a", "node-b") as nodes:
        done = ended(launch(nodes, kind, *command(tiny_model, whole, *QUICK), per_node=per_node))
        assert [code for code, _ in done] == [0, 0], done
    same_but_for_rounding(alone, whole)

    with network("node-a", "node-b") as nodes:
        processes = launch(nodes, kind, *command(tiny_model, disturbed, *QUICK), per_node=per_node)
        wait_for_steps(disturbed, processes[0])
        begun = time.monotonic()
        nodes[lost].kill() if how == "kill" else nodes[lost].cut()
        ((code, said),) = ended([processes[1 - lost]], PATIENCE + LAUNCHER)
        assert code == 1, said
        assert f"(on node-{'ab'[lost]}) was lost in step " in said
        assert "Start all of them again with --resume." in said
        assert "please report it" not in said
        assert "Traceback" not in said.partition("E1")[0]  # before that of the launcher
        print(f"{how}: the other node ended after {time.monotonic() - begun:.1f} s")

    with network("node-a", "node-b") as nodes:
        done = ended(launch(nodes, kind, *command(tiny_model, disturbed, "--resume", *QUICK), per_node=per_node))
        assert [code for code, _ in done] == [0, 0], done
        assert "resuming from" in done[0][1]
    assert lines(disturbed) == lines(whole)
    assert weights(disturbed) == weights(whole)


def test_a_process_that_hangs_is_given_up_after_ddp_timeout(
    tiny_model: Path, tmp_path: Path, nodes: list[Node]
) -> None:
    """The kernel of its machine answers for it, so it is not lost."""
    folder = tmp_path / "run"
    processes = launch(nodes, DDP, *command(tiny_model, folder, *QUICK, "training.ddp_timeout=8"))
    wait_for_steps(folder, processes[0])
    for process in Path("/proc").glob("[0-9]*"):
        if in_namespace(process, nodes[1].namespace):
            os.kill(int(process.name), signal.SIGSTOP)
    ((code, said),) = ended(processes[:1], 8 + 5 + LAUNCHER)
    assert code == 1
    assert "hangs or took longer than training.ddp_timeout" in said


def in_namespace(process: Path, namespace: str) -> bool:
    try:
        own = os.stat(process / "ns/net").st_ino == os.stat(f"/run/netns/{namespace}").st_ino
        return own and b"grpo" in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_node_that_reads_another_recipe_is_named(tiny_model: Path, tmp_path: Path, nodes: list[Node]) -> None:
    arguments = command(tiny_model, tmp_path / "run", *QUICK)
    for code, said in ended(launch(nodes, DDP, *arguments, but_second=("training.seed=1",))):
        assert code == 1  # the launcher's
        assert "rank 1 (on node-b) was started with another recipe than rank 0 (on node-a)" in said
        assert "training.seed: 1, there 0" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_run_folder_that_is_not_shared(tiny_model: Path, tmp_path: Path, nodes: list[Node], kind: list[str]) -> None:
    """Replicas train without: only the first process writes. To resume, all read. Shards are written by all."""
    folder, own = tmp_path / "runs/run", ("training.max_steps=2", "training.eval_every=0")
    folder.parent.mkdir()
    arguments = command(tiny_model, folder, *own)
    recipe = folder.with_suffix(".yaml").rename(tmp_path / "recipe.yaml")
    arguments[arguments.index(str(folder.with_suffix(".yaml")))] = str(recipe)

    def run(*more: str) -> list[tuple[int, str]]:
        return ended(launch(nodes, kind, *arguments, *more, hidden=(folder.parent,)))

    done = run()
    if kind == FSDP2:
        for code, said in done:
            assert code == 1
            assert "rank 1 (on node-b) is not the folder that rank 0 (on node-a) writes. With sharded weights" in said
        return
    assert [code for code, _ in done] == [0, 0], done
    assert "That will do until the run is resumed" in done[0][1]
    for code, said in run("--resume", "training.max_steps=4"):
        assert code == 1
        assert "checkpoints/step_000002 is not there on rank 1 (on node-b)" in said
