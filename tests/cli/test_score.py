"""`grpo score`: a file of completions, verdicts, and what is wrong with lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import python, run

ROWS = [
    {"completion": "<answer>1+2</answer>", "nums": [1, 2], "target": 3},
    {"completion": "<answer>1-2</answer>", "nums": [1, 2], "target": 3},
    {"completion": "so 3", "nums": [1, 2], "target": 3},
    {"completion": "<answer>1+2</answer>", "nums": [-1, 2], "target": 3},
    {"completion": "<answer>1+2</answer>", "nums": [1, 2], "target": 3, "status": "length"},
    {"completion": "a</think><answer>1+2</answer>", "nums": [1, 2], "target": 3, "prefill": "<think>"},
    {"completion": [{"role": "assistant", "content": "<answer>2+1</answer>"}], "nums": [1, 2], "target": 3},
]
VERDICTS = ["correct", "wrong", "no_answer", "gold_unparseable", "truncated", "correct", "correct"]


def write(*rows: object, to: str = "rows.jsonl") -> str:
    Path(to).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return to


def test_a_file_is_scored_line_by_line() -> None:
    result = run("score", write(*ROWS), "--reward", "countdown", "--out", "scored.jsonl", "--workers", "1")
    assert result.exit_code == 0, result.output
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [row["verdict"] for row in scored] == VERDICTS
    assert [row["reward"] for row in scored] == [1.0, 0.0, 0.0, None, 0.0, 1.0, 1.0]
    assert [row["line"] for row in scored] == [1, 2, 3, 4, 5, 6, 7]
    said = result.stdout.splitlines()
    assert said[0].startswith("countdown: 7 completions of rows.jsonl in ")
    assert said[1] == "  mean reward       0.5000 of 6 scored"
    assert "  correct           3  (42.9%)" in said
    assert said[-1].startswith("  rows.jsonl:4: gold_unparseable: nums must hold at least one number")


def test_columns_by_other_names_and_arguments_of_the_reward() -> None:
    tests = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]}
    write(*({"response": f"```python\ndef f(x): return {value}\n```", "gold": tests} for value in ("x + 1", "2")))
    options = ("--completion", "response", "--column", "tests=gold", "--workers", "1", "partial_credit=true")
    result = run("score", "rows.jsonl", "--reward", "code", *options)
    assert result.exit_code == 0, result.output
    assert "mean reward       0.7500 of 2 scored" in result.stdout


def test_a_function_of_one_s_own() -> None:
    Path("mine.py").write_text(
        "def fn(completions, answer, least=1, **kwargs):\n"
        "    if completions[0] == 'none': return [None]\n    return [float(len(completions[0]) >= least)]\n"
    )
    write(*({"completion": text, "answer": "x"} for text in ("ab", "a", "none")))
    result = run("score", "rows.jsonl", "--reward", "mine.py:fn", "least=2", "--out", "scored.jsonl", "--workers", "1")
    assert result.exit_code == 0, result.output
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [(row["reward"], row["verdict"]) for row in scored] == [(1.0, "scored"), (0.0, "scored"), (None, "unscored")]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (['{"completion": "a'], (), "rows.jsonl:1: not valid JSON, or cut off"),
        ([ROWS[0], {"text": "a"}], (), "rows.jsonl:2: no column 'completion' (there are 'text')"),
        (["[1]"], (), "rows.jsonl:1: not an object of columns"),
        ([{"completion": 5}], (), "rows.jsonl:1: column 'completion' is neither a text nor messages"),
        ([{"completion": "a", "nums": [1]}], (), "rows.jsonl:1: reward 'countdown' needs the column 'target'"),
        (
            [ROWS[0] | {"status": "odd"}],
            (),
            "status is 'odd', not one of environment, error, length, stop, turns",
        ),
        ([], (), "rows.jsonl: no rows"),
        (
            [{"completion": "a"}],
            ("--reward", "overlong", "max_completion_length=9", "soft_punish_cache=3"),
            "rows.jsonl:1: reward 'overlong' counts tokens: it needs the column 'completion_ids'",
        ),
        ([ROWS[0]], ("--reward", "mth"), "--reward: no built-in reward 'mth'"),
        ([ROWS[0]], ("--reward", "no.py:fn"), "--reward.path: there is no file"),
        ([ROWS[0]], ("depth=3",), "it takes no depth"),
        ([ROWS[0]], ("--reward", "code", "depth=3"), "it takes no depth"),
        ([ROWS[0]], ("depth",), "depth: write KEY=VALUE"),
        ([ROWS[0]], ("--column", "answer"), "--column answer: write NAME=COLUMN"),
        ([ROWS[0]], ("--column", "answer=gold"), "rows.jsonl:1: no column 'gold'"),
        ([ROWS[0]], ("--out", "no/such/folder"), "--out no/such/folder: cannot be written"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(rows: list, options: tuple, message: str) -> None:
    chosen = () if "--reward" in options else ("--reward", "countdown")
    result = run("score", write(*rows), "--workers", "1", *chosen, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_file_that_is_not_there() -> None:
    result = run("score", "nowhere.jsonl", "--reward", "countdown", "--workers", "1")
    assert (result.exit_code, result.stderr) == (2, "nowhere.jsonl: cannot be read: No such file or directory\n")


@pytest.mark.slow
def test_scoring_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    call = "import sys; from grpo.cli.main import app\ntry: app(sys.argv[1:])\nexcept SystemExit as end: pass\n"
    call += "print('imported', *[m for m in ('torch', 'transformers', 'datasets', 'accelerate') if m in sys.modules])"
    result = python("-c", call, "score", "rows.jsonl", "--reward", "countdown", cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "imported", result.stderr


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("grpo", "torch", "transformers", "datasets", "pydantic", "data"):
            raise ImportError(f"{name} is not there")
sys.meta_path.insert(0, Blocked())
import importlib
from rewards import REWARDS
for name in REWARDS:
    assert callable(getattr(importlib.import_module(f"rewards.{name}"), f"{name}_reward"))
from rewards import code, countdown, gsm8k
tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2]}
assert code.verify(tests, "```python\\ndef f(x): return x + 1\\n```").reward == 1
assert countdown.verify([1, 2], 3, "<answer>1+2</answer>").reward == 1
assert gsm8k.verify("#### 72", "<answer>72</answer>").reward == 1
code.stop()
"""


@pytest.mark.slow
def test_rewards_are_a_library_of_their_own(tmp_path: Path) -> None:
    result = python("-c", BLOCKED, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
