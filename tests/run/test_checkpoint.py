"""Checkpoints: what is saved comes back to the bit, and no kill, truncation, flipped bit or full disk costs a run."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from grpo.errors import UserError
from grpo.run.checkpoint import load_checkpoint, save_checkpoint, set_aside_newer
from grpo.run.manifest import MANIFEST
from grpo.run.search import latest_checkpoint, verified_checkpoint
from tests.launching import DIES

ROOM = Path(__file__).parents[2]


def save(root: Path, step: int, *, value: float = 1.0, keep: int = 2) -> Path:
    weights = torch.full((40, 30), value)
    return save_checkpoint(
        root,
        step,
        tensors={"model": {"embed": weights, "head": weights, "bias": torch.arange(5.0)}},
        states={"optimizer": {"state": {0: {"exp_avg": torch.full((200,), value)}}, "lr": 1e-6}},
        manifest={"metrics_offset": 17 * step},
        keep=keep,
    )


def steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back_to_the_bit(tmp_path):
    torch.manual_seed(3)
    tied = torch.randn(6, 4)
    tensors = {
        "policy": {"embed": tied, "head": tied, "transposed": torch.randn(3, 5).T, "slice": torch.randn(10, 4)[2:4]},
        "reference": {"half": torch.randn(7).bfloat16(), "scalar": torch.tensor(2.5), "count": torch.tensor([1, 2])},
    }
    parameter = torch.nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    python_random, numpy_random = random.Random(1), np.random.RandomState(2)
    states = {
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "numpy": numpy_random.get_state(), "python": python_random.getstate()},
    }
    path = save_checkpoint(
        tmp_path, 100, tensors=tensors, states=states, manifest={"threads": 2, "pair": (1, 0.1 + 0.2)}, keep=2
    )

    loaded = load_checkpoint(path)

    assert path.name == "step_000100"
    assert loaded.step == 100
    assert loaded.manifest["threads"] == 2
    assert loaded.manifest["pair"] == [1, 0.1 + 0.2]
    for name, group in tensors.items():
        assert group.keys() == loaded.tensors[name].keys()
        for key, tensor in group.items():
            assert tensor.dtype == loaded.tensors[name][key].dtype
            assert torch.equal(tensor, loaded.tensors[name][key]), key
    torch.testing.assert_close(loaded.states["optimizer"], optimizer.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.states["rng"]["torch"], torch.get_rng_state())
    restored = np.random.RandomState()
    restored.set_state(loaded.states["rng"]["numpy"])
    assert restored.randint(1 << 30) == numpy_random.randint(1 << 30)
    restored_python = random.Random()
    restored_python.setstate(loaded.states["rng"]["python"])
    assert restored_python.random() == python_random.random()


def test_all_files_have_the_mode_of_any_new_file(tmp_path):
    path = save(tmp_path, 1)
    (tmp_path / "new").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_state_that_would_run_code_when_loaded_is_refused_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match=r"'path'.*pathlib"):
        save_checkpoint(tmp_path, 2, tensors={}, states={"path": Path("x")}, manifest={}, keep=2)
    assert steps(tmp_path) == ["step_000001"]


def test_the_oldest_go_and_keep_is_at_least_two(tmp_path):
    for step in (5, 10, 100, 1_000_000):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == ["step_000010", "step_000100", "step_1000000"]
    assert latest_checkpoint(tmp_path).name == "step_1000000"
    with pytest.raises(ValueError, match="at least 2"):
        save(tmp_path, 2_000_000, keep=1)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 7, value=1.0)
    save(tmp_path, 7, value=2.0)
    assert steps(tmp_path) == ["step_000007"]
    assert load_checkpoint(tmp_path / "step_000007").tensors["model"]["embed"][0, 0] == 2.0


@pytest.mark.parametrize("share", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", MANIFEST])
def test_a_truncated_file_is_named_and_the_previous_checkpoint_used(tmp_path, caplog, name, share):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    os.truncate(newest / name, int(share * (newest / name).stat().st_size))
    with caplog.at_level(logging.WARNING, "grpo"):
        assert latest_checkpoint(tmp_path).name == "step_000010"
    assert "step_000020" in caplog.text
    assert name in caplog.text
    with pytest.raises(UserError, match=f"step_000020.*{name}"):
        verified_checkpoint(newest)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", MANIFEST])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, caplog, name):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    good = (newest / name).read_bytes()
    draw = random.Random(0)
    for _ in range(25):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        (newest / name).write_bytes(bad)
        caplog.clear()
        assert latest_checkpoint(tmp_path).name == "step_000010"
        assert name in caplog.text
    (newest / name).write_bytes(good)
    assert latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", MANIFEST])
def test_a_missing_file_is_named(tmp_path, caplog, name):
    newest = save(tmp_path, 20)
    (newest / name).unlink()
    assert latest_checkpoint(tmp_path) is None
    assert f"{name}: No such file" in caplog.text


def test_a_path_that_is_no_checkpoint_is_a_user_error_that_names_the_ones_there(tmp_path):
    save(tmp_path / "checkpoints", 20)
    for path in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "step_000030"):
        with pytest.raises(UserError, match="step_0000"):
            verified_checkpoint(path)
    with pytest.raises(UserError, match="no checkpoint"):
        verified_checkpoint(tmp_path / "nowhere" / "step_000001")
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_going_back_sets_newer_checkpoints_aside(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    aside = set_aside_newer(tmp_path, 10)
    assert [path.name for path in aside] == ["step_000030.abandoned", "step_000020.abandoned"]
    assert latest_checkpoint(tmp_path).name == "step_000010"
    save(tmp_path, 15)
    assert steps(tmp_path) == ["step_000010", "step_000015"]


# In a process of its own (forking one that holds torch's and pytest's threads is not safe), one fork for each moment:
# the fork is killed right after its n-th fsync, rename or rmtree, until one gets through the whole save.
KILLER = (
    DIES
    + """
    import json, os, shutil, sys
    from pathlib import Path
    sys.path[:0] = ["tests/run"]
    from test_checkpoint import save, steps
    from grpo.run.checkpoint import load_checkpoint
    from grpo.run.search import latest_checkpoint

    def save_and_die(root, step, moment):
        die_after(moment)
        save(root, step, value=2.0)
        os._exit(0)

    step, found, killed = int(sys.argv[2]), [], True
    for before in (10, 20):
        save(Path(sys.argv[1]) / "before", before)
    while killed:
        root = Path(sys.argv[1]) / str(len(found))
        shutil.copytree(root.parent / "before", root)
        if not (child := os.fork()):
            save_and_die(root, step, len(found) + 1)
        killed = os.waitpid(child, 0)[1] != 0
        latest = load_checkpoint(latest_checkpoint(root))
        first = [latest.step, latest.tensors["model"]["embed"][0, 0].item()]
        save(root, 40)
        found.append([*first, steps(root)])
    print(json.dumps(found))
"""
)


def run(script: str, *args: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOM, env=environment, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_sigkill_after_each_write_of_a_save_leaves_a_checkpoint_that_verifies(tmp_path):
    outcomes = json.loads(run(KILLER, tmp_path, 30))
    assert len(outcomes) > 6  # two files, manifest, folder, rename, parent
    seen = [(step, value) for step, value, _ in outcomes]
    switch = seen.index((30, 2.0))
    assert switch >= 5
    assert seen == [(20, 1.0)] * switch + [(30, 2.0)] * (len(seen) - switch)
    assert all(left in (["step_000020", "step_000040"], ["step_000030", "step_000040"]) for _, _, left in outcomes)


@pytest.mark.slow
def test_sigkill_while_the_same_step_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    outcomes = json.loads(run(KILLER, tmp_path, 20))
    seen = [(step, value) for step, value, _ in outcomes]
    switch = seen.index((20, 2.0))
    assert seen == [(20, 1.0)] * switch + [(20, 2.0)] * (len(seen) - switch)
    assert all(left == ["step_000020", "step_000040"] for _, _, left in outcomes)


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    import torch
    from grpo.run.checkpoint import save_checkpoint
    from grpo.run.search import latest_checkpoint
    from grpo.errors import RunError

    root, kind = Path(sys.argv[1]), sys.argv[2]
    def save(step, size):
        big = {"a": torch.ones(size)}
        tensors, states = ({"model": big}, {}) if kind == "tensors" else ({}, {"optimizer": big})
        save_checkpoint(root, step, tensors=tensors, states=states, manifest={}, keep=2)
    save(1, 10)
    save(2, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save(3, 100_000)
    except RunError as error:
        print(error)
    assert latest_checkpoint(root) == root / "step_000002"
    assert sorted(path.name for path in root.iterdir()) == ["step_000001", "step_000002"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensors", "states"])
def test_a_refused_write_keeps_the_old_checkpoints_and_says_where_and_how_much(tmp_path, kind):
    message = run(FULL_DISK, tmp_path, kind)
    assert str(tmp_path / "step_000003") in message
    assert "400,000 bytes" in message
    assert "are free" in message
    assert "newest is step_000002" in message
