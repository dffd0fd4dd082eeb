"""Tasks of the user's own by ``file.py:build``: rows that train, and one line for every way in which it may fail."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from grpo.audit.rows import check_data
from grpo.cli.main import app
from grpo.errors import UserError
from tests.launching import ROOT
from tests.prompts.small_rows import load, recipe
from tests.small_runs import small_run

SUMS = """
from datasets import Dataset
from my_words import QUESTION

def build(split, size, seed, *, largest=9):
    first = 0 if split == "train" else 1000
    rows = [{"prompt": QUESTION.format(first + i, seed), "answer": first + i + largest} for i in range(size or 30)]
    return Dataset.from_list(rows)
"""


def write(tmp_path, body, name="my_task.py"):
    (tmp_path / name).write_text(body)
    return f"{tmp_path / name}:build"


def write_sums(tmp_path):
    """A task in two files."""
    (tmp_path / "my_words.py").write_text('QUESTION = "what is {} + {} ?"\n')
    return write(tmp_path, SUMS)


def test_a_task_in_a_file_gives_the_rows_of_both_parts(tmp_path, monkeypatch):
    write_sums(tmp_path)
    monkeypatch.chdir(tmp_path)  # files are looked for from where grpo is started
    data = {"name": "my_task.py:build", "eval_size": 5, "args": {"largest": 7}}
    task = load(data, seed=3)
    assert (len(task.train), len(task.eval_prompts)) == (30, 5)
    assert task.eval_prompts[1].prompt == "what is 1001 + 3 ?"
    assert task.eval_prompts[1].columns == {"answer": 1008}
    assert len(load({**data, "train_size": 12}).train) == 12
    assert load({**data, "args": {"seed": 4}}, seed=3).eval_prompts[0].prompt == "what is 1000 + 4 ?"
    assert check_data(recipe(data)) == ": 30 rows to train on, 5 held out"


def test_a_task_says_whether_it_needs_the_network(tmp_path):
    body = "def build(split, size, seed): raise OSError('no route')\ndef needs_network(**_): return True\n"
    name = write(tmp_path, body, "from_the_hub.py")
    assert f"the rows of {name} come from the hub" in check_data(recipe({"name": name}))


HEAD = "from datasets import Dataset, DatasetDict\n"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("build = 5", "{file}:build is no function but 5"),
        ("class build: pass", "{file}:build is no function but <class"),
        ("def build(size): pass", r"{file}:build does not take .split, size, seed.: too many positional arguments"),
        ("def build(split, size): pass", "{file}:build does not take .*: got an unexpected keyword argument 'seed'"),
        ("def built(split, size, seed): pass", "{file} has no 'build'; did you mean built"),
        ("def build(split, size, seed)\n    pass", "{file}:1: SyntaxError"),
        ("import no_such_module", "{file}:1: ModuleNotFoundError"),
        ("\ndef build(split, size, seed):\n    return {}['x']", r"build\('train', …\) failed: {file}:3: KeyError: 'x'"),
        ("def build(split, size, seed): raise SystemExit(3)", r"build\('train', …\) failed: {file}:1: SystemExit: 3"),
        ("def build(split, size, seed):\n    return Dataset.from_list(5)", "failed: {file}:3: TypeError"),
        ("def build(split, size, seed): return [{'prompt': 'a'}]", "returned list, not a datasets.Dataset"),
        ("def build(split, size, seed): return DatasetDict()", "returned DatasetDict, not a datasets.Dataset"),
        ("def build(split, size, seed): pass", "returned NoneType, not a datasets.Dataset"),
        ("def build(split, size, seed): return Dataset.from_list([{'q': 'a'}])", "no column prompt; its columns are q"),
        ("def build(split, size, seed): return Dataset.from_dict({'prompt': []})", "no rows"),
        ("needs_network = len\ndef build(split, size, seed): pass", r"needs_network\(…\) failed: .*TypeError"),
    ],
)
def test_a_task_that_does_not_work_is_told_by_file_and_cause(tmp_path, body, said):
    imports = HEAD if "Dataset" in body else ""
    name = write(tmp_path, imports + body)
    said = said.replace("{file}", name.removesuffix(":build"))
    with pytest.raises(UserError, match=f"^data.name: .*{said}") as caught:
        check_data(recipe({"name": name}))
    assert len(str(caught.value).splitlines()) == 1


def test_unsound_rows_of_a_task_are_named_by_row(tmp_path):
    body = "def build(split, size, seed): return Dataset.from_list([{'prompt': 'a'}, {'prompt': ''}])"
    name = write(tmp_path, HEAD + body)
    with pytest.raises(UserError, match=rf"data.name: 1 of 2 rows in .* corrupt:\n  {name}\[train\]:2: .*empty"):
        load({"name": name})


def test_arguments_that_the_task_does_not_take_are_refused(tmp_path):
    name = write(tmp_path, "def build(split, size, seed, *, depth): pass")
    with pytest.raises(UserError, match=r"data.args: missing a required argument: 'depth'; .* takes seed, depth"):
        load({"name": name})
    with pytest.raises(UserError, match=r"data.args: .*unexpected keyword argument 'widht'; .* takes seed, depth"):
        load({"name": name, "args": {"depth": 1, "widht": 2}})


def test_a_run_trains_on_a_task_in_a_file(tiny_model, tmp_path, monkeypatch):
    data = {"name": write_sums(tmp_path), "args": {"largest": 5}, "train_size": 8}
    calls = small_run(tiny_model, tmp_path / "run", monkeypatch, data=data, steps=1)
    assert [len(prompts) for _, prompts in calls] == [4]
    (line, *_) = (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"].endswith("+ 0 ?")


def test_a_mistake_in_a_task_ends_in_exit_code_2_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = write(tmp_path, "def build(split, size, seed):\n    return [{'prompt': 'a'}]\n")
    done = CliRunner().invoke(app, ["train", str(ROOT / "recipes/smoke_cpu.yaml"), f"data.name={name}", "data.args={}"])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        f"data.name: {name}('train', …) returned list, not a datasets.Dataset: "
        "make one by datasets.Dataset.from_list(rows)"
    ]
