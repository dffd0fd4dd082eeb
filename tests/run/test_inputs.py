"""Rows, model, tokenizer and the user's code are hashed; a run does not go on from others unless it is allowed to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grpo.errors import UserError
from grpo.model.loading import load_tokenizer
from grpo.prompts.task import load_task
from grpo.run.inputs import hash_inputs
from grpo.run.manifest import MANIFEST, write_manifest
from grpo.run.same_run import changed_inputs
from tests.conftest import make_recipe
from tests.small_runs import small_run

MINE = "rewards.0.path"
REWARD = "from helper import points\n\n\ndef judge(completions, **_):\n    return [points(c) for c in completions]\n"


@pytest.fixture
def project(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody's: model, rows, and a reward that imports what lies beside it."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_model, folder / "model")
    write_rows(folder)
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "helper.py").write_text("from more import deeper\n\ndef points(text):\n    return len(text) % 2\n")
    (folder / "more").mkdir()
    (folder / "more/__init__.py").write_text("")
    (folder / "more/deeper.py").write_text("import json\nimport numpy\n")
    (folder / "unrelated.py").write_text("")
    monkeypatch.chdir(folder)
    return folder


def write_rows(folder: Path, **last: Any) -> None:
    rows = [{"prompt": f"{i} {i + 1}", "answer": i} for i in range(11)] + [{"prompt": "3 4", "answer": 7} | last]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def sections(project: Path, **more: Any) -> dict[str, Any]:
    return {
        "data": {"name": None, "path": "rows.jsonl", "eval_size": 0},
        "rewards": [{"path": "my_reward.py:judge"}],
    } | more


def hashes(project: Path, **more: Any) -> dict[str, str]:
    recipe = make_recipe(project / "model", **sections(project, **more))
    task = load_task(recipe, load_tokenizer(recipe.model))
    return hash_inputs(recipe, task)


def change_weights(project: Path) -> None:
    weights = load_file(project / "model/model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, project / "model/model.safetensors", metadata={"format": "pt"})


def append(path: str, text: str) -> Any:
    def change(project: Path) -> None:
        with (project / path).open("a") as file:
            file.write(text)

    return change


CHANGES = {
    "data: rows has changed": lambda project: write_rows(project, answer=8),
    "model.name: model.safetensors has changed": change_weights,
    "model.name: config.json has changed": append("model/config.json", "\n"),
    "model.name: tokenizer.json has changed": append("model/tokenizer.json", "\n"),
    "model.name: chat_template.jinja is new": append("model/chat_template.jinja", "{{ messages[0].content }}"),
    "rewards.0.path: my_reward.py has changed": append("my_reward.py", "\n"),
    "rewards.0.path: helper.py has changed": append("helper.py", "\n"),
    "rewards.0.path: more/deeper.py has changed": append("more/deeper.py", "\n"),
}


@pytest.mark.parametrize("says", CHANGES)
def test_each_input_that_changes_is_named(project: Path, says: str) -> None:
    training = {"training": {"output_dir": "unused", "prompts_per_step": 4}}
    before = hashes(project, **training)
    assert hashes(project, **training) == before
    CHANGES[says](project)
    assert changed_inputs(before, hashes(project, **training)) == [says]


def test_what_is_no_input_may_change(project: Path) -> None:
    training = {"training": {"output_dir": "unused", "prompts_per_step": 4}}
    before = hashes(project, **training)
    (project / "unrelated.py").write_text("x = 1\n")
    (project / "model/README.md").write_text("about it")
    (project / "model/training_args.bin").write_text("of another program")
    rows = (project / "rows.jsonl").read_text()
    (project / "rows.jsonl").write_text(rows.replace('", "', '",   "'))  # the same rows, written differently
    assert hashes(project, **training) == before


def test_a_file_that_an_argument_of_a_reward_names_is_an_input(project: Path) -> None:
    (project / "words.txt").write_text("one\n")
    args = {"words": "words.txt", "limit": 3, "text": "x" * 5000, "odd": "a\x00b"}
    more = {
        "rewards": [{"path": "my_reward.py:judge", "args": args}],
        "training": {"output_dir": "unused", "prompts_per_step": 4},
    }
    before = hashes(project, **more)
    (project / "words.txt").touch()
    assert hashes(project, **more) == before
    append("words.txt", "two\n")(project)
    assert changed_inputs(before, hashes(project, **more)) == ["rewards.0.args.words has changed"]


def test_losses_and_backends_of_ones_own_and_dotted_names_are_inputs(project: Path) -> None:
    (project / "my_loss.py").write_text("from .nothing import it\n")
    (project / "more/engine.py").write_text("from . import deeper\nimport helper\n")
    found = hashes(
        project,
        algorithm={"loss_type": "my_loss.py:loss"},
        rollout={"backend": "more.engine:Engine"},
        rewards=[{"path": "my_reward.py:judge"}, {"path": "math:sqrt"}, {"path": "yaml:safe_load"}],
        training={"output_dir": "unused", "prompts_per_step": 4},
    )
    assert "algorithm.loss_type: my_loss.py" in found
    backend = {name for name in found if name.startswith("rollout.backend")}
    assert backend == {
        f"rollout.backend: {f}" for f in ("helper.py", "more/__init__.py", "more/deeper.py", "more/engine.py")
    }
    yaml = {name for name in found if name.startswith("rewards.2.path")}
    assert {"rewards.2.path: yaml/__init__.py", "rewards.2.path: yaml/loader.py"} <= yaml
    assert all(name.startswith("rewards.2.path: yaml/") for name in yaml), "a library's own files, and no other's"


def test_an_environment_its_tools_and_what_its_arguments_name_are_inputs(project: Path) -> None:
    (project / "my_env.py").write_text("import helper\n\nclass Env: ...\n")
    (project / "my_tools.py").write_text("def look(what: str) -> str: ...\n")
    (project / "words.txt").write_text("one\n")
    environment = {"path": "my_env.py:Env", "tools": ["my_tools.py:look"], "args": {"words": "words.txt", "rounds": 3}}
    found = hashes(project, environment=environment, training={"output_dir": "unused", "prompts_per_step": 4})
    assert {name for name in found if name.startswith("environment") and "more/" not in name} == {
        "environment.path: my_env.py",
        "environment.path: helper.py",
        "environment.tools.0: my_tools.py",
        "environment.args.words",
    }


def test_a_package_around_a_file_and_imports_by_name_are_inputs(project: Path) -> None:
    (project / "more/judge.py").write_text("import importlib\n\nhelper = importlib.import_module('helper')\n")
    training = {"output_dir": "unused", "prompts_per_step": 4}
    found = hashes(project, rewards=[{"path": "more/judge.py:judge"}], training=training)
    code = {name.removeprefix("rewards.0.path: ") for name in found if name.startswith("rewards")}
    assert code == {"judge.py", "__init__.py", "deeper.py", "helper.py"}


def test_rows_that_a_task_makes_and_rows_held_out_are_hashed(tiny_model: Path) -> None:
    def of(**data: Any) -> dict[str, str]:
        recipe = make_recipe(tiny_model, data={"name": "countdown", "train_size": 40, "eval_size": 4} | data)
        task = load_task(recipe, load_tokenizer(recipe.model))
        return {name: hash for name, hash in hash_inputs(recipe, task).items() if name.startswith("data")}

    assert of().keys() == {"data: rows", "data: held-out rows"}
    assert of() == of()
    assert changed_inputs(of(), of(eval_size=5)) == ["data: held-out rows has changed"]


@pytest.mark.slow
def test_a_run_is_not_resumed_from_other_inputs_unless_it_may(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    more = sections(project, data={"name": None, "path": "rows.jsonl", "args": {}, "train_size": None})

    def run(steps: int, **options: Any) -> None:
        small_run(project / "model", folder, monkeypatch, steps=steps, **options, **more)

    run(1)
    recorded = json.loads((folder / "environment.json").read_text())["inputs"]
    assert json.loads((folder / "checkpoints/step_000001" / MANIFEST).read_text())["inputs"] == recorded
    run(2, resume=True)
    for change in (CHANGES["data: rows has changed"], change_weights, CHANGES["rewards.0.path: helper.py has changed"]):
        change(project)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refusal:
        run(3, resume=True)
    lines = str(refusal.value).splitlines()
    changed = [
        "data: rows has changed",
        "model.name: model.safetensors has changed",
        "rewards.0.path: helper.py has changed",
    ]
    assert [line.strip() for line in lines[1:-1]] == changed
    assert "--allow-changed-inputs" in lines[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run(3, resume=True, allow_changed_inputs=True)
    assert all(line in caplog.text for line in changed)
    run(4, resume=True)  # the checkpoint after is made from what is there now

    newest = folder / "checkpoints/step_000004"  # as earlier versions wrote it
    content = json.loads((newest / MANIFEST).read_text())
    del content["inputs"], content["checksum"], content["files"], content["format"]
    (newest / MANIFEST).unlink()
    write_manifest(newest, content, {})
    change_weights(project)
    run(5, resume=True)
