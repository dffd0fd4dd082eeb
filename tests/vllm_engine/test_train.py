"""Training with completions of real engines: colocated and as servers, two models, LoRA both ways, steps ahead."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launching import DDP, launch
from tests.vllm_engine.conftest import SMOLLM2, ServerProcess, serve
from tests.vllm_engine.runs import colocated, metrics, on, recipe, rollouts, train

DIFFERENCE = "sampling/sampling_logp_difference/mean"


def changed(folder: Path, base: str) -> bool:
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
    return any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def check(folder: Path, model: Path, steps: int, difference: float) -> None:
    """Every step was made, by completions of the version that it asked for, with logprobs near the trainer's."""
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row[DIFFERENCE] < difference
        assert 0 < row["sampling/probe_logp_difference/mean"] < difference
        assert row["grad_norm"] > 0
        assert {v for r in rollouts(folder, row["step"]) for _, _, v in r["versions"]} == {row["step"] - 1}
    assert changed(folder, str(model))


def test_a_colocated_engine_trains_the_tiny_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = recipe(folder, rollout=colocated(vllm_weight_transfer="path"))
    done = train(path)
    assert done.returncode == 0, done.stderr
    check(folder, Path("data/tiny_base"), 3, 1e-4)
    listened = re.search(r"server on unix:(/dev/shm/grpo-vllm-\d+-)", (folder / "vllm_rank0.log").read_text())
    assert listened, "on a socket, not on a port"
    assert not list(Path("/dev/shm").glob(Path(listened[1]).name + "*")), "of this run, all others being others'"


def test_a_server_trains_the_tiny_model(tmp_path: Path, tiny_server: ServerProcess) -> None:
    folder = tmp_path / "run"
    done = train(recipe(folder, rollout=on(tiny_server)))
    assert done.returncode == 0, done.stderr
    check(folder, Path("data/tiny_base"), 3, 1e-4)


@pytest.fixture(scope="module")
def smollm2_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = serve(SMOLLM2, tmp_path_factory.mktemp("smollm2_server"), dtype="bfloat16")
    yield server.wait()
    server.kill()


SMALL_STEPS = {"max_steps": 2, "prompts_per_step": 2}
CHAT = {"template": "chat", "max_prompt_length": 128, "args": {"max_numbers": 3}}


def test_a_server_trains_smollm2_in_bfloat16(tmp_path: Path, smollm2_server: ServerProcess) -> None:
    folder = tmp_path / "run"
    model = {"dtype": "bfloat16"}
    done = train(recipe(folder, SMOLLM2, model=model, data=CHAT, rollout=on(smollm2_server), training=SMALL_STEPS))
    assert done.returncode == 0, done.stderr
    check(folder, SMOLLM2, 2, 0.1)


def test_a_colocated_engine_trains_smollm2_in_bfloat16(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    model = {"dtype": "bfloat16"}
    done = train(recipe(folder, SMOLLM2, model=model, data=CHAT, rollout=colocated(), training=SMALL_STEPS))
    assert done.returncode == 0, done.stderr
    check(folder, SMOLLM2, 2, 0.1)


@pytest.mark.parametrize(("way", "in_4_bits"), [("merged", False), ("adapter", False), ("merged", True)])
def test_lora_reaches_the_engine(tmp_path: Path, way: str, in_4_bits: bool) -> None:
    """Adapters start at zero: a later step's log-probabilities agree only if what was learned has arrived. Over 4-bit
    weights adapters travel apart, whatever is asked for, and the engine holds what the 4 bits stand for."""
    folder = tmp_path / "run"
    model = {"lora": {"r": 4, "lora_alpha": 8}, "load_in_4bit": in_4_bits}
    rollout = colocated(vllm_lora_sync=way)
    done = train(recipe(folder, model=model, rollout=rollout, optimizer={"learning_rate": 0.03}))
    assert done.returncode == 0, done.stderr
    check(folder, Path("data/tiny_base"), 3, 1e-4)
    assert (folder / "final/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize(("staleness", "dynamic"), [(1, False), (3, True)])
def test_steps_ahead_are_sampled_within_the_bound_and_resumed_with_what_was_in_flight(
    tmp_path: Path, tiny_server: ServerProcess, staleness: int, dynamic: bool
) -> None:
    folder, again = tmp_path / "run", tmp_path / "again"
    sections = {
        "rollout": on(tiny_server, max_staleness=staleness, max_completion_length=64),
        "prompts": {"dynamic_sampling": dynamic, "curriculum": dynamic},
        "training": {"max_steps": 7, "save_every": 4, "save_total_limit": 4},
    }
    done = train(recipe(folder, **sections))
    assert done.returncode == 0, done.stderr
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 8))
    for row in rows:
        versions = {v for r in rollouts(folder, row["step"]) for _, _, v in r["versions"]}
        assert versions <= set(range(row["step"] - 1 - staleness, row["step"]))
        assert row["sampling/importance_sampling_ratio/mean"] > 0
    assert max(row["sampling/staleness/max"] for row in rows) == staleness

    # The same run from its checkpoint on: the next step trains on the very completions that were ahead.
    shutil.copytree(folder, again)
    for newer in (again / "checkpoints").glob("step_000007"):
        shutil.rmtree(newer)
    done = train(recipe(again, **sections), "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert "is lost" not in done.stderr
    for first, second in zip(rollouts(folder, 5), rollouts(again, 5), strict=True):
        assert first == second


def test_two_processes_share_a_server(tmp_path: Path, tiny_server: ServerProcess) -> None:
    folder = tmp_path / "run"
    done = launch(DDP, "-m", "grpo", "train", recipe(folder, rollout=on(tiny_server)))
    assert done.returncode == 0, done.stderr
    check(folder, Path("data/tiny_base"), 3, 1e-4)


def test_two_processes_share_an_engine_that_is_split_over_both(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(DDP, "-m", "grpo", "train", recipe(folder, rollout=colocated(vllm_tensor_parallel_size=2)))
    assert done.returncode == 0, done.stderr
    check(folder, Path("data/tiny_base"), 3, 1e-4)
    assert not (folder / "vllm_rank1.log").exists()
