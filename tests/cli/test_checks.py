"""`grpo validate` and `grpo train --dry-run`, with a tiny model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from grpo.config.load import load_recipe
from tests.cli.conftest import RECIPE, python, run


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    from data.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def rows(tiny_model):
    """Writes rows.jsonl from the given lines, and rows.yaml, a recipe for them."""

    def rows(*lines: dict | str) -> None:
        text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
        Path("rows.jsonl").write_text(text)
        source = "{path: rows.jsonl, eval_size: 0, max_prompt_length: 64}"
        recipe = RECIPE.replace("some/model", str(tiny_model)).replace("data: {name: countdown}", f"data: {source}")
        Path("rows.yaml").write_text(recipe + "rollout: {max_completion_length: 8}\n")

    return rows


ROW = {"prompt": "1 2 3", "nums": [1, 2, 3], "target": 6}


def test_validate_several(rows):
    rows(*[ROW] * 40)
    Path("bad.yaml").write_text(RECIPE + "temperature: 1\n")
    result = run("validate", "rows.yaml", "bad.yaml", "rows.yaml", "rollout.top_k=-1", "training.seed=3")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 4
    ok = "OK rows.yaml: 40 rows to train on, 0 held out\n"
    result = run("validate", "rows.yaml", "bad.yaml", "rows.yaml", "rollout.top_k=1")
    assert (result.exit_code, result.stdout) == (2, ok + ok)
    assert result.stderr == "bad.yaml:5: temperature: unknown key, temperature belongs under rollout or evaluation\n"
    result = run("validate", "rows.yaml")
    assert (result.exit_code, result.stdout) == (0, ok)


def test_validate_says_once_what_is_unexpected(rows, caplog):
    rows(*[ROW | {"prompt": f"{i % 8} 2 3"} for i in range(40)])
    result = run("validate", "rows.yaml", "data.eval_size=2", "training.prompts_per_step=4")
    assert result.stdout == "OK rows.yaml: 30 rows to train on, 2 held out\n"
    said = [record.getMessage() for record in caplog.records]
    assert said.count("data: 8 rows repeat a held-out question and are left out of training") == 1


def test_validate_without_a_recipe():
    result = run("validate", "rollout.top_k=1")
    assert (result.exit_code, result.stderr) == (2, "no recipe given, only overrides: rollout.top_k=1\n")


def test_an_override_may_be_longer_than_a_path():
    result = run("validate", "recipe.yaml", f"data.args={{a: {'x' * 5000}, b: 1}}", "rollout.top_k=-1")
    assert result.exit_code == 2
    assert result.stderr.startswith("override rollout.top_k=-1: must be at least 0")


def test_validate_names_corrupt_rows_and_reward_functions(rows):
    rows(ROW, '{"prompt": "1 2', {"nums": [1]})
    result = run("validate", "rows.yaml", "rewards.1.path=nowhere.py:fn", "algorithm.loss_type=no_file.py:my_loss")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rows.jsonl:2" in result.stderr
    assert "rows.jsonl:3" in result.stderr
    assert "nowhere.py" in result.stderr
    assert "no_file.py" in result.stderr


def test_validate_finds_rows_that_nothing_could_be_right_on(rows):
    bad = ROW | {"nums": [-1, 2]}
    rows(*[ROW] * 20, bad, *[ROW] * 20, *[bad] * 9)
    result = run("validate", "rows.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "reward 'countdown' can score nothing on 10 of 50 rows:" in result.stderr
    assert "rows.jsonl:21: nums must hold at least one number and none below 0, got [-1, 2]" in result.stderr
    assert "and 5 more" in result.stderr


def test_validate_lists_every_row_that_nothing_could_be_right_on(rows):
    rows(*[ROW] * 20, *[ROW | {"nums": [-1, i]} for i in range(12)], *[ROW] * 18)
    result = run("validate", "--rows", "rows.yaml")
    assert result.exit_code == 2
    why = "countdown: nums must hold at least one number and none below 0, got"
    assert result.stdout.splitlines() == [f"rows.jsonl:{21 + i}: {why} [-1, {i}]" for i in range(12)]
    assert "more than scoring.max_unscorable_rows: 0.02 allows" in result.stderr


def test_a_few_such_rows_are_told_and_refuse_nothing(rows, caplog):
    rows(*[ROW] * 50, ROW | {"nums": [-1, 2]}, *[ROW] * 9)
    result = run("validate", "rows.yaml")
    said = "OK rows.yaml: 60 rows to train on, 0 held out; countdown can score nothing on 1 of them (--rows"
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(said)
    listed = run("validate", "rows.yaml", "--rows").stdout.splitlines()
    assert listed[1].startswith("rows.jsonl:51: countdown: nums must hold at least one number")
    assert run("validate", "rows.yaml", "scoring.max_unscorable_rows=0").exit_code == 2
    assert run("train", "rows.yaml", "--dry-run").exit_code == 0
    assert "countdown' can score nothing on 1 of 60 rows" in caplog.text


def test_cosine_asks_its_verifier_about_rows(rows):
    rows(*[ROW] * 40, ROW | {"nums": [-1, 2]})
    cosine = "rewards=[{name: cosine, args: {verifier: countdown, max_completion_length: 8}}]"
    result = run("validate", "rows.yaml", cosine, "--rows")
    assert result.stdout.startswith("rows.jsonl:41: cosine: nums must hold")
    assert result.exit_code == 2


def test_a_dry_run_finds_them_too(rows):
    rows(*[ROW] * 40, ROW | {"nums": [-1, 2]})
    result = run("train", "rows.yaml", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "reward 'countdown' can score nothing on 1 of 41 rows:\n  rows.jsonl:41: nums must hold" in result.stderr


@pytest.mark.slow
def test_a_folder_one_letter_away_is_no_hub_id(tmp_path):
    (tmp_path / "mine").mkdir()
    result = python("-m", "grpo", "train", "recipe.yaml", "model.name=mine/tiny_bse", cwd=tmp_path)
    assert result.returncode == 2
    assert "model.name: mine/tiny_bse does not exist" in result.stderr
    assert "hub" not in result.stderr.replace("a hub id", ""), "nobody was asked"


MISSING = ["data/tiny_bse", "models/none", "./none", "/no/such/model", "some/deep/folder/model", "none.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MISSING)
def test_validate_refuses_a_model_folder_that_is_not_there(name):
    result = run("validate", "recipe.yaml", f"model.name={name}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"recipe.yaml: model.name: {name} does not exist (from " in result.stderr
    assert ("did you mean data/tiny_base?" in result.stderr) == (name == "data/tiny_bse")


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_asked_once_and_folders_with_near_names_are_told(tmp_path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "config.json").write_text("{}")
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    begun = time.monotonic()
    result = python("-m", "grpo", "train", "recipe.yaml", "model.name=model/tiny", cwd=tmp_path, more=online)
    assert result.returncode == 2
    assert "model.name: model/tiny is no folder here (from " in result.stderr
    assert ", did you mean models/tiny?, it was not downloaded before, and the hub can't be reached: " in result.stderr
    assert time.monotonic() - begun < 30, "its own client tries for a minute"


def test_validate_finds_a_missing_column(rows):
    rows(*[{"prompt": "1 2 = 3", "nums": [1, 2]}] * 40)
    result = run("validate", "rows.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "reward 'countdown' (rewards.countdown.countdown_reward) needs target: neither a column" in result.stderr


@pytest.mark.slow
def test_validate_says_what_it_could_not_check():
    result = run("validate", "recipe.yaml", "model.name=runs/not/yet/final")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("OK recipe.yaml: ")
    assert "prompts are checked when the run starts (no tokenizer of runs/not/yet/final" in result.stdout


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(tmp_path, rows):
    rows(*[ROW] * 40)
    before = sorted(tmp_path.rglob("*"))
    result = run("train", "rows.yaml", "--dry-run", "rollout.top_k=4")
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    Path("resolved.yaml").write_text(result.stdout)
    assert load_recipe("resolved.yaml") == load_recipe("rows.yaml", ["rollout.top_k=4"])
    assert "top_k: 4" in result.stdout
    assert "top_p" not in result.stdout, "a default is not printed"


@pytest.mark.slow
def test_validate_looks_at_the_environment_too_beside_everything_else(rows):
    """With a tokenizer or without; what is wrong is told once."""
    Path("mine.py").write_text("class Game:\n    def reset(self, **row): ...\n")
    rows(*[{"prompt": "1 2 = 3", "nums": [1, 2]}] * 40)
    result = run("validate", "rows.yaml", "environment.path=mine.py:Game")
    assert result.exit_code == 2
    assert "has neither a step(text) nor a public method that the model could call" in result.stderr
    assert "needs target: neither a column" in result.stderr
    assert result.stderr.count("has neither a step") == 1
