"""The command line: exit codes, who says what, and that a wrong recipe costs nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import grpo
from grpo.cli.main import app
from grpo.config.load import load_recipe
from grpo.errors import Preempted, RunError, UserError

ROOT = Path(__file__).parents[2]
RECIPE = """\
model: {name: some/model}
data: {name: countdown}
rewards: [{name: countdown}]
training: {output_dir: run}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")  # so that it is put back, whatever a command sets
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("LOCAL_RANK")
    Path("recipe.yaml").write_text(RECIPE)


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a module with the given functions in the place of ``grpo.NAME``, which then is not imported."""

    def stand_in(name: str, **functions):
        module = ModuleType(f"grpo.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"grpo.{name}", module)
        if "." not in name:
            monkeypatch.setattr(grpo, name, module, raising=False)

    return stand_in


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )


def failing(error: BaseException):
    def train(recipe, resume):
        raise error

    return train


# --- a wrong recipe costs nothing ---


def test_wrong_recipe_is_told_before_torch_is_imported(tmp_path):
    (tmp_path / "bad.yaml").write_text(RECIPE + "rollout: {num_generations: 1, temprature: 1}\n")
    script = """
import runpy, sys
sys.argv = ["grpo", "train", "bad.yaml", "training.max_steps=none"]
try:
    runpy.run_module("grpo", run_name="__main__", alter_sys=True)
finally:
    print(sorted({"torch", "transformers", "accelerate", "datasets", "numpy"} & sys.modules.keys()))
"""
    before = sorted(tmp_path.rglob("*"))
    done = python("-c", script)
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr.splitlines() == [
        "bad.yaml:5: rollout.num_generations: must be at least 2, got 1. Completions per prompt, G. At least 2: an "
        "advantage compares a completion with its group.",
        "bad.yaml:5: rollout.temprature: unknown key, did you mean temperature?",
        "override training.max_steps=none: expected an integer, got 'none'",
    ]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "eval", "validate"])
def test_missing_recipe(command):
    result = run(command, "recipes/none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "recipes/none.yaml: no such file\n"


@pytest.mark.parametrize("arguments", [["train"], ["trane", "x"], ["train", "recipe.yaml", "--resum"]])
def test_wrong_command_line(arguments):
    assert run(*arguments).exit_code == 2


def test_module_and_version():
    done = python("-m", "grpo", "--version")
    assert (done.returncode, done.stdout) == (0, f"grpo {grpo.__version__}\n")


# --- what train calls ---


@pytest.mark.parametrize("stage", ["grpo", "sft"])
@pytest.mark.parametrize(
    ("switches", "resume"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume-from", "run/checkpoints/step_000010"], "run/checkpoints/step_000010"),
    ],
)
def test_train_calls_its_stage(stand_in, stage, switches, resume):
    called = []
    for name in ("sft", "trainer"):
        stand_in(name, train=lambda recipe, resume, name=name: called.append((name, recipe, resume)))
    result = run("train", "recipe.yaml", f"stage={stage}", *switches, "rollout.top_k=5")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("recipe.yaml", [f"stage={stage}", "rollout.top_k=5"])
    assert called == [({"grpo": "trainer", "sft": "sft"}[stage], recipe, resume)]


# --- exit codes ---


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("run: holds a run already"), 2, "run: holds a run already\n"),
        (UserError("one\ntwo"), 2, "one\ntwo\n"),
        (RunError("the loss is NaN at step 3: lower optimizer.learning_rate"), 1,
         "the loss is NaN at step 3: lower optimizer.learning_rate\n"),
        (Preempted("saved run/checkpoints/step_000004; start again with --resume"), 143,
         "saved run/checkpoints/step_000004; start again with --resume\n"),
        (
            KeyboardInterrupt(),
            130,
            "stopped by Ctrl-C; what came after the last checkpoint, if there is one, is not saved\n",
        ),
    ],
)  # fmt: skip
def test_expected_endings_print_their_message_alone(stand_in, error, code, message):
    Path("run").mkdir()
    stand_in("trainer", train=failing(error))
    result = run("train", "recipe.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)
    assert list(Path("run").iterdir()) == []


def test_unexpected_exception_leaves_its_traceback_in_the_run_folder(stand_in):
    Path("run").mkdir()
    stand_in("trainer", train=failing(ValueError("seven\nof nine")))
    result = run("train", "recipe.yaml")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert result.stderr.startswith("ValueError: seven. ")
    assert result.stderr.endswith("The traceback is in run/error.txt.\n")
    text = Path("run/error.txt").read_text()
    assert text.startswith("Traceback")
    assert text.endswith("ValueError: seven\nof nine\n")


def test_without_a_run_folder_the_traceback_is_printed_before_the_last_line(stand_in):
    stand_in("trainer", train=failing(ValueError("seven")))
    result = run("train", "recipe.yaml")
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.splitlines()[-1].startswith("ValueError: seven. ")
    assert not Path("run").exists()


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name so that torch need not be imported."""


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), "Lower training.micro_batch_tokens"),
        (OSError(errno.ENOSPC, "No space left on device"), "Free some disk space"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "Install the package that holds gguf"),
    ],
)
def test_the_last_line_says_what_to_do(stand_in, error, advice):
    stand_in("trainer", train=failing(error))
    assert advice in run("train", "recipe.yaml").stderr.splitlines()[-1]


def test_only_the_first_process_of_a_machine_repeats_user_errors(stand_in, monkeypatch):
    stand_in("trainer", train=failing(UserError("wrong")))
    monkeypatch.setattr("grpo.cli.exit_codes.SECONDS_TO_SPEAK", 0.0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = run("train", "recipe.yaml")
    assert (result.exit_code, result.output) == (2, "")
    assert (run("train", "nowhere.yaml").exit_code, result.output) == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("train", "recipe.yaml").stderr == "wrong\n"


def test_other_processes_say_who_they_are(stand_in, monkeypatch):
    Path("run").mkdir()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    stand_in("trainer", train=failing(RunError("lost")))
    assert run("train", "recipe.yaml").stderr == "[rank 3] lost\n"
    stand_in("trainer", train=failing(ValueError("seven")))
    assert run("train", "recipe.yaml").stderr.startswith("[rank 3] ValueError: seven. ")
    assert Path("run/error_rank3.txt").read_text().startswith("Traceback")


# --- eval, report ---


def test_eval_of_a_recipe_and_of_a_run(stand_in):
    called = []

    def evaluate_recipe(recipe, model):
        called.append((recipe.training.output_dir, recipe.evaluation.num_generations, model))
        return {"eval/accuracy": 0.5, "eval/completions/mean_length": 98.25}

    stand_in("evaluate", evaluate_recipe=evaluate_recipe)
    Path("run/final").mkdir(parents=True)
    Path("run/recipe.yaml").write_text(RECIPE)
    result = run("eval", "recipe.yaml")
    assert result.stdout == "eval/accuracy                 0.5\neval/completions/mean_length  98.25\n"
    run("eval", "recipe.yaml", "--model", "other")
    run("eval", "run", "evaluation.num_generations=4")
    run("eval", "run", "--model", "other")
    assert called == [("run", 1, None), ("run", 1, "other"), ("run", 4, "run/final"), ("run", 1, "other")]


def test_eval_of_a_run_that_has_no_model_yet():
    Path("run").mkdir()
    result = run("eval", "run")
    assert (result.exit_code, result.stderr) == (2, "run: is not a run folder (there is no recipe.yaml in it)\n")
    Path("run/recipe.yaml").write_text(RECIPE)
    result = run("eval", "run")
    assert result.exit_code == 2
    assert result.stderr == ("run: has no final model yet; name another with --model PATH (there is no final in it)\n")


def test_report(stand_in):
    stand_in("report.write", write_report=lambda run: run / "report.html")
    assert run("report", "run").stderr == "run: no such run folder\n"
    Path("run").mkdir()
    assert run("report", "run").stderr == "run: is not a run folder (there is no metrics.jsonl in it)\n"
    Path("run/metrics.jsonl").touch()
    result = run("report", "run")
    assert (result.exit_code, result.stdout) == (0, "run/report.html\n")


# --- validate and dry run, with a tiny model ---


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


def test_validate_without_a_recipe():
    result = run("validate", "rollout.top_k=1")
    assert (result.exit_code, result.stderr) == (2, "no recipe given, only overrides: rollout.top_k=1\n")


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


def test_a_dry_run_finds_them_too(rows):
    rows(*[ROW] * 40, ROW | {"nums": [-1, 2]})
    result = run("train", "rows.yaml", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "reward 'countdown' can score nothing on 1 of 41 rows:\n  rows.jsonl:41: nums must hold" in result.stderr


def test_a_folder_one_letter_away_is_no_hub_id(tmp_path):
    (tmp_path / "mine").mkdir()
    result = python("-m", "grpo", "train", "recipe.yaml", "model.name=mine/tiny_bse", cwd=tmp_path)
    assert result.returncode == 2
    assert "model.name: mine/tiny_bse does not exist" in result.stderr
    assert "hub" not in result.stderr.replace("a hub id", ""), "nobody was asked"


def test_validate_finds_a_missing_column(rows):
    rows(*[{"prompt": "1 2 = 3", "nums": [1, 2]}] * 40)
    result = run("validate", "rows.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "reward 'countdown' (rewards.countdown.countdown_reward) needs target: neither a column" in result.stderr


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
