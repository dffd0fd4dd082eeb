"""The compute type of a stage: resolved once, told in one line, and part of what a checkpoint belongs to."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo.errors import UserError
from grpo.run import session
from grpo.run.same_run import check_same_run, run_identity
from grpo.run.session import hybrid_sharding, make_accelerator, resolve_dtype, sharding
from tests.conftest import make_recipe


@pytest.fixture(params=[True, False], ids=["with instructions", "without"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A CPU with or without instructions for bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": request.param}, raising=False)
    monkeypatch.setattr(session, "prepare_process", lambda: None)  # it would stay for the other tests
    AcceleratorState._reset_state(reset_partial_state=True)
    yield request.param
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_type_is_told_in_one_line(
    tmp_path: Path, instructions: bool, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="grpo")
    recipe = make_recipe(tmp_path, model={"dtype": dtype})
    accelerator = make_accelerator(recipe)
    resolved = resolve_dtype(recipe, accelerator).model.dtype
    assert resolved == {"auto": "bfloat16" if instructions else "float32"}.get(dtype, dtype)
    expected = {
        ("auto", True): ["model.dtype: auto is bfloat16 here (this cpu has instructions for bfloat16)"],
        ("auto", False): ["model.dtype: auto is float32 here (this cpu has no instructions for bfloat16)"],
        ("bfloat16", False): [
            "this cpu has no instructions for bfloat16 and computes it several times as slowly as float32; set "
            "model.dtype: auto or float32"
        ],
    }
    assert caplog.messages == expected.get((dtype, instructions), [])


def test_a_run_is_not_resumed_where_auto_is_another_type(tmp_path: Path, instructions: bool) -> None:
    recipe = make_recipe(tmp_path, model={"dtype": "auto"})
    now = run_identity(resolve_dtype(recipe, make_accelerator(recipe)), world_size=1, threads=1)
    for dtype in ("bfloat16", "float32"):
        saved = run_identity(make_recipe(tmp_path, model={"dtype": dtype}), world_size=1, threads=1)
        if (dtype == "bfloat16") == instructions:
            check_same_run(saved, now)
        else:
            with pytest.raises(UserError, match=r"model\.dtype: "):
                check_same_run(saved, now)


@pytest.mark.parametrize(("dtype", "gathered"), [(torch.bfloat16, torch.bfloat16), (torch.float32, None)])
def test_sharded_weights_are_gathered_in_the_recipe_s_type_and_reduced_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, gathered: torch.dtype | None
) -> None:
    monkeypatch.setenv("FSDP_VERSION", "2")
    plugin = sharding(dtype)
    plugin.set_mixed_precision("bf16")  # what accelerate does on GPUs, for --mixed_precision bf16
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype) == (gathered, torch.float32)
    assert (policy.output_dtype, policy.cast_forward_inputs) == (None, False)


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        sharding(torch.float32)


@pytest.mark.parametrize(("replicate", "shard", "fits"), [(2, 4, True), (4, 2, True), (2, 2, False), (8, 1, False)])
def test_sizes_of_hybrid_sharding_must_fit_the_launch(
    monkeypatch: pytest.MonkeyPatch, replicate: int, shard: int, fits: bool
) -> None:
    assert hybrid_sharding() is None
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", str(replicate))
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(shard))
    monkeypatch.setenv("WORLD_SIZE", "8")
    if fits:
        assert hybrid_sharding().fsdp_dim_names == ["dp_shard"], "gradients are averaged over nodes by the update"
    else:
        with pytest.raises(UserError, match=rf"8 processes can't be .* {replicate} times dp_shard_size {shard}"):
            hybrid_sharding()
