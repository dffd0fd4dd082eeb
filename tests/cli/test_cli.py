"""The command line: that a wrong recipe costs nothing, that a wrong command line is one line, what commands call."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import grpo
from grpo.cli.main import main
from grpo.config.load import load_recipe
from tests.cli.conftest import RECIPE, python, run

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


def test_bitsandbytes_does_not_warn_of_a_kernel_that_is_never_used():
    """Whoever imports it, and before anything else of ours: a task of the user's own may, and so may a reward."""
    says = Path(importlib.util.find_spec("bitsandbytes").origin).parent / "backends/cpu/ops.py"
    assert "logger = logging.getLogger(__name__)" in says.read_text()
    warns = "import grpo, logging; logging.getLogger('bitsandbytes.backends.cpu.ops').warning('no kernel')"
    assert python("-c", warns).stderr == ""


@pytest.mark.parametrize("command", ["train", "eval", "validate"])
def test_missing_recipe(command):
    result = run(command, "recipes/none.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "recipes/none.yaml: no such file or recipe; `grpo recipes` lists those that grpo ships\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "grpo train: missing argument 'RECIPE' (grpo train --help)"),
        (["trane", "x"], "grpo: no such command 'trane'. Did you mean 'train'? (grpo --help)"),
        (["train", "recipe.yaml", "--resum"], "grpo train: no such option: --resum (Possible options: --resume, "
         "--resume-from) (grpo train --help)"),
        (["train", "recipe.yaml", "--max_steps", "3"], "grpo train: no such option: --max_steps; write "
         "training.max_steps=VALUE (grpo train --help)"),
        (["train", "recipe.yaml", "--lr=1"], "grpo train: no such option: --lr; write optimizer.learning_rate=VALUE "
         "(grpo train --help)"),
        (["eval", "run", "--temperature", "0"], "grpo eval: no such option: --temperature; write "
         "rollout.temperature=VALUE or evaluation.temperature=VALUE (grpo eval --help)"),
        (["watch", "run", "--seed", "0"], "grpo watch: no such option: --seed (grpo watch --help)"),
        (["recipes", "shwo"], "grpo recipes: no such command 'shwo'. Did you mean 'show'? (grpo recipes --help)"),
        (["train", "recpie.yaml"], "recpie.yaml: no such file or recipe, did you mean recipe.yaml?"),
        (["eval", "rollout.top_k=1"], "rollout.top_k=1: no recipe given, only an override; the recipe comes first"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo", *arguments])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    assert capsys.readouterr() == ("", f"{message}\n")


def test_no_command_gets_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["grpo"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code == 2
    assert "recipes   List the recipes" in capsys.readouterr().err


COMMANDS = (
    *("train", "eval", "plan", "probe", "validate", "audit", "score", "report", "watch", "compare"),
    *("recipes", "chat", "push", "convert"),
)


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]])
def test_the_help_is_plain_and_fits_80_columns(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert result.stdout.isascii()
    assert max(map(len, result.stdout.splitlines())) <= 80


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
        stand_in(name, train=lambda recipe, resume, name=name, **_: called.append((name, recipe, resume)))
    result = run("train", "recipe.yaml", f"stage={stage}", *switches, "rollout.top_k=5")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("recipe.yaml", [f"stage={stage}", "rollout.top_k=5"])
    assert called == [({"grpo": "trainer", "sft": "sft"}[stage], recipe, resume)]


def test_a_used_folder_is_refused_before_anything_is_loaded(stand_in):
    called = []
    stand_in("trainer", train=lambda *given, **_: called.append(given))
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("{}\n")
    for switches in ([], ["--probe"]):
        result = run("train", "recipe.yaml", *switches)
        assert result.exit_code == 2
        assert "already holds a run (metrics.jsonl)" in result.stderr
    assert run("train", "recipe.yaml", "--resume").exit_code == 0
    assert len(called) == 1


# --- eval, report ---


def evaluated(metrics, recipe, on_result):
    on_result(SimpleNamespace(metrics=metrics, rows=[], recipe=recipe, suite="", facts=None))


@pytest.fixture(autouse=True)
def _writes_no_evaluation(stand_in):
    stand_in("run.evaluations", write_evaluation=lambda folder, name, *_, **__: folder / f"{name or 'final'}.json")


def test_eval_of_a_recipe_and_of_a_run(stand_in):
    called = []

    def evaluate_recipe(recipe, model, on_result):
        called.append((recipe.training.output_dir, recipe.evaluation.num_generations, model))
        evaluated({"eval/accuracy": 0.5, "eval/completions/mean_length": 98.25}, recipe, on_result)

    stand_in("evaluation.outside", evaluate_recipe=evaluate_recipe)
    Path("run/final").mkdir(parents=True)
    Path("run/recipe.yaml").write_text(RECIPE)
    result = run("eval", "recipe.yaml")
    assert result.stdout == "eval/accuracy                 0.5\neval/completions/mean_length  98.25\n"
    assert result.stderr == "nothing is written without a run folder; --output FOLDER keeps numbers and samples\n"
    run("eval", "recipe.yaml", "--model", "other")
    written = run("eval", "run", "evaluation.num_generations=4", "--name", "four")
    assert written.stderr == "run/eval/four.json and its samples, four.jsonl\n"
    run("eval", "run", "--model", "other")
    assert called == [("run", 1, None), ("run", 1, "other"), ("run", 4, "run/final"), ("run", 1, "other")]


@pytest.mark.parametrize("command", [["eval", "run"], ["validate", "run/recipe.yaml"], ["audit", "run/recipe.yaml"],
                                     ["train", "run/recipe.yaml"]])  # fmt: skip
def test_a_stranger_s_run_executes_nothing_without_trust(tmp_path, stand_in, command):
    called = []
    stand_in("evaluation.outside", evaluate_recipe=lambda recipe, model, on_result: called.append(model))
    stand_in("trainer", train=lambda recipe, resume, **_: called.append(recipe))
    Path("run/final").mkdir(parents=True)
    Path("run/environment.json").write_text('{"host": "elsewhere"}')
    Path("run/spy.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef fn(completions, **kwargs): ...\n")
    Path("run/recipe.yaml").write_text(RECIPE.replace("{name: countdown}]", '{path: "run/spy.py:fn"}]'))
    result = run(*command)
    if command[0] == "train":  # a link to it is no recipe of one's own
        Path("link.yaml").symlink_to("run/recipe.yaml")
        assert run("train", "link.yaml").stderr == result.stderr.replace("run was", f"{tmp_path}/run was")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("run was made by somebody else or on another machine (it does not have the mark of")
    assert "\n  rewards[0].path: run/spy.py:fn\n" in result.stderr
    assert "--trust" in result.stderr
    assert not called
    assert not Path("ran").exists()
    if command[0] == "eval":
        Path("run/environment.json").rename("environment.json")
        assert run(*command).exit_code == 2, "whatever the folder lacks"
        assert not called
        Path("environment.json").rename("run/environment.json")
    if command[0] in ("eval", "train"):
        assert run(*command, "--trust").exit_code == 0
        assert len(called) == 1
        own = run(*command, "rewards=[{name: countdown}]")
        assert own.exit_code == 0, "an override replaces the stranger's code"


def test_eval_of_a_run_that_is_not_there():
    Path("runs/smoke").mkdir(parents=True)
    Path("runs/smoke/metrics.jsonl").touch()
    assert run("eval", "runs/smok").stderr == "runs/smok: no such run folder, did you mean runs/smoke?\n"


def test_eval_of_a_run_that_has_no_model_yet():
    Path("run").mkdir()
    result = run("eval", "run")
    assert (result.exit_code, result.stderr) == (2, "run: is not a run folder (there is no recipe.yaml in it)\n")
    Path("run/recipe.yaml").write_text(RECIPE)
    result = run("eval", "run")
    assert result.exit_code == 2
    assert result.stderr == ("run: has no final model yet; name another with --model PATH (there is no final in it)\n")


def test_report(stand_in):
    stand_in("report.write", write_report=lambda run, running: run / "report.html")
    assert run("report", "run").stderr == "run: no such run folder\n"
    Path("run").mkdir()
    assert run("report", "run").stderr == "run: is not a run folder (there is no metrics.jsonl in it)\n"
    Path("run/metrics.jsonl").touch()
    result = run("report", "run")
    assert (result.exit_code, result.stdout) == (0, "run/report.html\n")


@pytest.mark.parametrize("arguments", [["train", ""], ["train", "recipe.yaml", "--resume-from="], ["eval", ""],
                                       ["eval", "recipe.yaml", "--model", " "], ["audit", "recipe.yaml", "--gold="],
                                       ["report", ""], ["validate", ""]])  # fmt: skip
def test_a_shell_variable_without_a_value_is_not_the_default(arguments, stand_in):
    """``--resume-from "$CHECKPOINT"`` would start another run, ``eval "$RUN"`` take the working directory."""
    stand_in("trainer", train=lambda *_, **__: None)
    stand_in("evaluation.outside", evaluate_recipe=lambda *_, **__: None)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert " is empty" in result.output
