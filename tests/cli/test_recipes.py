"""`grpo recipes`: the list, one shown, one copied; and the recipes used by name from a folder that is not ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.cli import recipes
from grpo.config.find import SHIPPED, shipped_recipes
from grpo.config.load import load_recipe
from tests.cli.conftest import ROOT, run


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # so that it is put back, whatever a command sets


# --- the list ---


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_the_list_has_a_line_for_each(arguments):
    result = run(*arguments)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    (smoke,) = [line for line in lines if line.startswith("smoke_cpu ")]
    assert smoke.split()[:5] == ["smoke_cpu", "grpo", "tiny", "CPU", "1"]
    assert smoke.endswith("rollout, reward, update, evaluation, checkpoint, report, final model.")
    assert result.stdout.isascii(), "no drawing, which a pipe or a log would have to carry"


def test_every_recipe_says_what_it_is_and_what_it_needs():
    for summary in recipes.summarize_recipes():
        assert len(summary.about) > 30, summary
        assert summary.hardware.startswith(("CPU ", "GPU ")), summary
        assert summary.model == "tiny" or summary.model.endswith(("B", "M")), summary
        assert summary.stage == load_recipe(summary.name).stage, summary


def test_a_second_stage_knows_the_first():
    bases = {summary.name: summary.base for summary in recipes.summarize_recipes()}
    assert bases["word_sums_tiny_cpu"] == "word_sums_tiny_sft_cpu"
    assert bases["countdown_qwen2.5-0.5b"] == "countdown_qwen2.5-0.5b_sft"
    assert bases["smoke_cpu"] is None


def test_a_screen_gets_lines_that_fit(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert recipes._cut("a recipe: for all", 12) == "a recipe: f…"
    assert recipes._cut("a recipe: for all", 11) == "a recipe…"
    assert recipes._cut("a recipe: for all", 17) == recipes._cut("a recipe: for all", None) == "a recipe: for all"


# --- show and copy ---


@pytest.mark.parametrize("name", ["demo_cpu", "demo_cpu.yaml", "recipes/demo_cpu.yaml"])
def test_show_prints_the_file(name):
    result = run("recipes", "show", name)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == (SHIPPED / "demo_cpu.yaml").read_text()


@pytest.mark.parametrize(
    ("to", "target"), [([], "demo_cpu.yaml"), (["mine.yaml"], "mine.yaml"), (["folder"], "folder/demo_cpu.yaml")]
)
def test_copy_writes_a_file_and_says_what_is_next(to, target):
    Path("folder").mkdir()
    result = run("recipes", "copy", "demo_cpu", *to)
    assert (result.exit_code, result.stderr) == (0, "")
    assert Path(target).read_bytes() == (SHIPPED / "demo_cpu.yaml").read_bytes()
    assert result.stdout == (
        f"{target} is yours to edit; then: grpo validate {target}\nto train: grpo train {target}\n"
    )
    Path(target).write_text("edited\n")
    again = run("recipes", "copy", "demo_cpu", *to)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr.startswith(f"{target}: exists, and is not overwritten; ")
    assert len(again.stderr.splitlines()) == 1
    assert Path(target).read_text() == "edited\n"


def test_copy_of_a_second_stage_names_the_first():
    result = run("recipes", "copy", "word_sums_tiny_cpu")
    assert result.stdout.splitlines()[0] == (
        "word_sums_tiny_cpu.yaml starts from what another recipe makes, so first: grpo train word_sums_tiny_sft_cpu"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "demo"], "demo: no such recipe, did you mean demo_cpu?"),
        (["show", "zzz"], "zzz: no such recipe; `grpo recipes` lists those that grpo ships"),
        (["copy", "/etc/passwd"], "/etc/passwd: no such recipe; `grpo recipes` lists those that grpo ships"),
        (["copy", "demo_cpu", "no/such.yaml"], "no/such.yaml: there is no folder no; make it first"),
        (["copy", "demo_cpu", "training.seed=1"],
         "training.seed=1: copy takes no overrides; edit the copy, or give them to grpo train"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(arguments, message):
    result = run("recipes", *arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"{message}\n")
    assert not list(Path().iterdir())


# --- by name, from a folder that is not ours ---


@pytest.mark.parametrize("command", [["validate", "smoke_cpu"], ["audit", "smoke_cpu", "--rows", "2"],
                                     ["train", "smoke_cpu", "--dry-run"]])  # fmt: skip
def test_commands_take_a_name_from_anywhere(command):
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "no tokenizer" not in result.output, "data/tiny_base is found where it is shipped"
    if "--dry-run" in command:
        Path("resolved.yaml").write_text(result.stdout)
        assert load_recipe("resolved.yaml") == load_recipe("smoke_cpu")
    else:
        assert result.stdout.splitlines()[-1].startswith("OK smoke_cpu: ")


@pytest.mark.slow
def test_a_run_is_evaluated_from_another_folder(monkeypatch):
    size = ["data.eval_size=2", "rollout.max_completion_length=4"]
    Path("runs/mine").mkdir(parents=True)
    shutil.copy(SHIPPED / "smoke_cpu.yaml", "runs/mine/recipe.yaml")
    shutil.copytree(SHIPPED.parent / "data" / "tiny_base", "runs/mine/final")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for given in ("../runs/mine", "smoke_cpu"):
        result = run("eval", given, *size)
        assert result.exit_code == 0, result.output
        assert "eval/accuracy " in result.stdout


def test_a_second_stage_without_the_first_says_so():
    result = run("train", "word_sums_tiny_cpu", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith("model.name: runs/word_sums_tiny_sft/final does not exist (from ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "show", "demo_cpu"]])
def test_a_reader_that_stops_reading_is_no_mistake(arguments):
    command = [sys.executable, "-m", "grpo", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running.stdout.close()
    said = running.stderr.read()
    running.wait(timeout=60)
    assert "Broken" not in said
    assert "Traceback" not in said


def test_the_list_needs_no_output(monkeypatch):
    """``>&-``: Python then has no sys.stdout at all."""
    monkeypatch.setattr("sys.stdout", None)
    recipes.list_recipes()
