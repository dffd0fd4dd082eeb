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
from grpo.run.session import make_accelerator, resolve_dtype
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
    assert accelerator.mixed_precision == {"bfloat16": "bf16", "float32": "no"}[resolved]
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
