"""A run folder's code is executed only where this user has made the folder here, or says --trust."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from grpo.config.load import dump_recipe
from grpo.errors import UserError
from grpo.run.folder import prepare_run_folder, release_run_folder
from grpo.run.owner import check_own_code, code_of, why_not_own
from tests.conftest import make_recipe

CODE = {"rewards": [{"path": "subprocess:getoutput"}]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    prepare_run_folder(make_recipe(Path("x"), training={"output_dir": str(folder)}, **CODE), resume=False)
    release_run_folder(folder)
    return folder


def test_a_run_of_one_s_own_is_one_s_own_also_when_it_is_moved(folder):
    assert why_not_own(folder) is None
    folder.rename(folder.with_name("moved"))
    assert why_not_own(folder.with_name("moved")) is None
    assert os.stat(Path(os.environ["XDG_STATE_HOME"], "grpo", "run_key")).st_mode & 0o077 == 0


def test_a_resumed_run_stays_one_s_own(folder):
    (folder / "checkpoints/step_000001").mkdir(parents=True)
    recipe = make_recipe(Path("x"), training={"output_dir": str(folder), "max_steps": 7}, **CODE)
    prepare_run_folder(recipe, resume=True)
    release_run_folder(folder)
    assert why_not_own(folder) is None


def another_machine(folder, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "elsewhere"))


def another_machine_with_a_key(folder, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "elsewhere"))
    other = folder.with_name("other")
    prepare_run_folder(make_recipe(Path("x"), training={"output_dir": str(other)}), resume=False)
    release_run_folder(other)


def another_recipe(folder, monkeypatch):
    text = dump_recipe(make_recipe(Path("x"), rewards=[{"path": "os:system"}]))
    (folder / "recipe.yaml").write_text(text)


def another_host(folder, monkeypatch):
    facts = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(facts | {"host": "elsewhere"}))


def facts_of_another_type(folder, monkeypatch):
    (folder / "environment.json").write_text("[1]")


def facts_that_are_no_json(folder, monkeypatch):
    (folder / "environment.json").write_bytes(b"\xff\x00")


def no_mark(folder, monkeypatch):
    (folder / ".made_here").unlink()


def open_to_all(folder, monkeypatch):
    folder.chmod(0o777)


def another_user(folder, monkeypatch):
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def another_user_s_model(folder, monkeypatch):
    (folder / "final").mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    os.chown(folder / "final", 12345, 12345)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (another_machine, "does not have the mark|mark"),
        (another_machine_with_a_key, "its mark is not yours"),
        (another_recipe, "its recipe was changed since"),
        (another_host, "its mark is not yours"),
        (facts_of_another_type, "its mark is not yours"),
        (facts_that_are_no_json, "its mark can't be read"),
        (no_mark, "does not have the mark of a run of yours"),
        (open_to_all, "everybody may write to run"),
        (another_user, "belongs to user"),
        (another_user_s_model, "final belongs to user 12345"),
    ],
)
def test_whatever_else_made_it_is_refused_with_the_code_and_the_switch(folder, monkeypatch, change, why):
    change(folder, monkeypatch)
    with pytest.raises(UserError, match=why) as refusal:
        check_own_code(folder, make_recipe(Path("x"), **CODE))
    assert "\n  rewards[0].path: subprocess:getoutput\n" in str(refusal.value)
    assert "--trust" in str(refusal.value)
    check_own_code(folder, make_recipe(Path("x")))  # no code, nothing to trust


@pytest.mark.parametrize(
    ("section", "content", "key"),
    [
        ("algorithm", {"loss_type": "loss.py:mine"}, "algorithm.loss_type"),
        ("data", {"name": "task.py:build"}, "data.name"),
        ("rollout", {"backend": "backend.py:Mine"}, "rollout.backend"),
        ("rollout", {"backend": "vllm", "vllm_python": "/tmp/x"}, "rollout.vllm_python"),
        ("rollout", {"backend": "vllm", "vllm_args": ["--middleware=x.y"]}, "rollout.vllm_args"),
        ("model", {"trust_remote_code": True}, "model.trust_remote_code"),
        ("model", {"attn_implementation": "somebody/kernels"}, "model.attn_implementation"),
        ("rewards", [{"name": "code", "args": {"allow_unsafe": True}}], "rewards[0].args.allow_unsafe"),
        ("environment", {"path": "world.py:World"}, "environment.path"),
        ("environment", {"tools": ["tools.py:look"]}, "environment.tools.0"),
        ("environment", {"name": "python", "args": {"allow_unsafe": True}}, "environment.args.allow_unsafe"),
    ],
)
def test_every_key_that_executes_something_is_known(section, content, key):
    assert [found for found, _ in code_of(make_recipe(Path("x"), **{section: content}))] == [key]
    assert not list(code_of(make_recipe(Path("x"), model={"attn_implementation": "flash_attention_2"})))
