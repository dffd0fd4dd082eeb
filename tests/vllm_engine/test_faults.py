"""Real engines that are killed, stopped and started again under a run; real runs that are killed over an engine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vllm_engine.conftest import TINY, ServerProcess, serve
from tests.vllm_engine.runs import colocated, metrics, on, recipe, rollouts, start, train, wait_for

LONG = {"max_steps": 12, "eval_every": 0, "save_every": 0}


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    started = serve(TINY, tmp_path_factory.mktemp("server"))
    yield started
    started.kill()


@pytest.fixture
def server(one_server: ServerProcess) -> ServerProcess:
    """A server that is up, whatever the test before did to it."""
    if one_server.process is None or one_server.process.poll() is not None:
        one_server.start()
    return one_server.wait()


def engines_of(pid: int) -> list[int]:
    """Processes of colocated engines that the run ``pid`` started, vLLM's own children included."""
    found, parents = [], {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
                if b"vllm" in (entry / "cmdline").read_bytes() or b"VLLM" in (entry / "comm").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue

    def descends(process: int) -> bool:
        while process in parents:
            if process == pid:
                return True
            process = parents[process]
        return False

    return [process for process in found if descends(process) and process != pid]


def test_a_server_that_is_killed_and_comes_back_gets_the_weights_again(tmp_path: Path, server: ServerProcess) -> None:
    folder = tmp_path / "run"
    run = start(recipe(folder, rollout=on(server), training=LONG))
    wait_for(lambda: len(metrics(folder)) >= 3, run)
    server.kill()
    server.start()  # with the weights that it was first started with
    _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    assert f"vllm server {server.url} is lost" in said
    assert f"vllm server {server.url} is back; it gets the weights of step" in said
    assert [row["step"] for row in metrics(folder)] == list(range(1, 13))
    for row in metrics(folder):
        assert row.get("sampling/sampling_logp_difference/mean", 0.0) < 1e-4  # absent where no group had signal
        assert {v for r in rollouts(folder, row["step"]) for _, _, v in r["versions"]} == {row["step"] - 1}


def test_a_server_that_is_gone_for_good_ends_the_run_with_a_checkpoint(tmp_path: Path, server: ServerProcess) -> None:
    folder = tmp_path / "run"
    path = recipe(folder, rollout=on(server, vllm_server_timeout=3.0), training=LONG)
    run = start(path)
    wait_for(lambda: len(metrics(folder)) >= 3, run)
    server.kill()
    _, said = run.communicate(timeout=100)
    assert run.returncode == 1
    done = len(metrics(folder))
    assert (
        f"rank 0, step {done}: vllm server {server.url} did not answer within rollout.vllm_server_timeout (3 s)" in said
    )
    assert "last error:" in said
    assert f"saved {folder}/checkpoints/step_{done:06d}; start again with --resume" in said
    assert "Traceback" not in said

    server.start().wait()
    again = train(path, "--resume")
    assert again.returncode == 0, again.stderr
    assert [row["step"] for row in metrics(folder)] == list(range(1, 13))


def test_a_server_that_hangs_passes_its_deadline(tmp_path: Path, server: ServerProcess) -> None:
    folder = tmp_path / "run"
    rollout = on(server, vllm_server_timeout=3.0, vllm_generation_timeout=4.0, vllm_sync_timeout=4.0)
    run = start(recipe(folder, rollout=rollout, training=LONG))
    wait_for(lambda: len(metrics(folder)) >= 3, run)
    server.send(signal.SIGSTOP)
    _, said = run.communicate(timeout=100)
    server.send(signal.SIGCONT)
    assert run.returncode == 1
    assert f"vllm server {server.url} is lost: no answer to POST" in said
    assert "within 4 s" in said
    assert "start again with --resume" in said


def test_of_two_servers_one_takes_over_and_the_other_may_come_back(tmp_path: Path, server: ServerProcess) -> None:
    second = serve(TINY, tmp_path).wait()
    folder = tmp_path / "run"
    run = start(recipe(folder, rollout=on(server, second), training={**LONG, "max_steps": 200}))
    wait_for(lambda: len(metrics(folder)) >= 3, run)
    second.kill()
    lost_at = len(metrics(folder))
    wait_for(lambda: len(metrics(folder)) >= lost_at + 5, run)
    second.start().wait()
    back_at = len(metrics(folder))
    wait_for(lambda: len(metrics(folder)) >= back_at + 3, run)
    run.terminate()
    _, said = run.communicate(timeout=100)
    second.kill()
    assert run.returncode == 143, said
    assert f"vllm server {second.url} is lost" in said
    assert f"vllm server {second.url} is back; it gets the weights of step" in said
    assert f"vllm server {server.url} is lost" not in said


def test_a_colocated_engine_that_is_killed_is_started_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start(recipe(folder, rollout=colocated(), training=LONG))
    wait_for(lambda: len(metrics(folder)) >= 3, run)
    for process in engines_of(run.pid):
        os.kill(process, signal.SIGKILL)
    _, said = run.communicate(timeout=200)
    assert run.returncode == 0, said
    # Whichever is noticed first: that its process ended, or (while the process is not yet reaped) that nobody answers.
    ended = "the vllm engine ended with code -9; starting it again" in said
    assert ended or "the vllm engine of rank 0 does not answer; starting it again" in said
    assert [row["step"] for row in metrics(folder)] == list(range(1, 13))


def test_an_engine_dies_with_a_run_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = start(recipe(folder, rollout=colocated(), training=LONG))
    wait_for(lambda: len(metrics(folder)) >= 1, run)
    engine = engines_of(run.pid)
    assert engine
    run.kill()
    run.communicate()
    wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in engine), seconds=30)


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train(recipe(folder, rollout=colocated(vllm_args=["--no-such-option"])))
    assert done.returncode == 1
    assert "rank 0, step 0: the vllm engine ended with code 2 while starting (rollout.backend: hf" in done.stderr
    assert "--no-such-option" in done.stderr
    assert "Traceback" not in done.stderr
