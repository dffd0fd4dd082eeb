r"""data/suite_rows.py: rows in the columns of each suite become a question, and a gold that our verifiers read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data import suite_rows
from data.code import human_eval
from data.files import Rows
from grpo.config.suites import suites
from rewards import code
from rewards.code import check_row as code_row
from rewards.code import verify as verify_code
from rewards.math import verify
from rewards.verdict import Outcome

OLYMPIAD = {
    "id": 1606,
    "question": "Find all $x$ with $x^2 = 4$.",
    "solution": ["Clear."],
    "final_answer": ["$2$", "$-2$"],
    "context": None,
    "image_1": None,
    "modality": "Text-only",
    "difficulty": "Competition",
    "is_multiple_answer": True,
    "unit": None,
    "answer_type": "Numerical",
    "error": None,
    "question_type": "Open-ended",
    "subfield": "Algebra",
    "subject": "Math",
    "language": "English",
}
GPQA = {
    "Pre-Revision Question": "?",
    "Question": "Which energy tells two states apart?\n",
    "Correct Answer": "10^-4 eV\n\n",
    "Incorrect Answer 1": "10^-11 eV",
    "Incorrect Answer 2": "10^-8 eV\n",
    "Incorrect Answer 3": "10^-9 eV",
    "High-level domain": "Physics",
    "Record ID": "rec0",
}
MBPP = {
    "task_id": 11,
    "text": "Write a python function to remove first and last occurrence of a given character from the string.",
    "code": 'def remove_Occ(s,ch): \r\n    return s.replace(ch, "", 1)[::-1].replace(ch, "", 1)[::-1]',
    "test_list": ['assert remove_Occ("hello","l") == "heo"', 'assert remove_Occ("abcda","a") == "bcd"'],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_WITH_SETUP = MBPP | {
    "test_setup_code": "two = 2",
    "code": "def f(x): return x",
    "test_list": ["assert f(two) == 2"],
}
MBPP_SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements from the given two lists.",
    "code": "import math\ndef similar(a, b):\n  return tuple(set(a) & set(b))\n",
    "test_imports": ["import math"],
    "test_list": ["assert set(similar((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))"],
}
LIVECODEBENCH = {
    "question_title": "Add",
    "question_content": "Add two numbers.\n",
    "platform": "atcoder",
    "question_id": "abc387_a",
    "contest_id": "abc387",
    "contest_date": "2025-01-04T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": json.dumps([{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
LEETCODE = LIVECODEBENCH | {
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
    "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    "private_test_cases": json.dumps([{"input": "5\n6", "output": "11", "testtype": "functional"}]),
    "metadata": json.dumps({"func_name": "add"}),
}
ADD = "class Solution:\n    def add(self, a, b): return "
MATH: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "math500",
        {
            "problem": "Convert $(0,3)$.",
            "solution": "\\boxed{x}",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        "(3, \\pi/2)",
        "(3, \\pi)",
    ),
    (
        "aime24",
        {"id": 60, "problem": "Every morning.", "solution": "So \\boxed{204}.", "answer": "204", "year": "2024"},
        "204",
        "205",
    ),
    ("aime25", {"problem": "Find the sum.", "answer": "070", "id": "0"}, "70", "7"),
    ("amc23", {"id": 0, "answer": 27.0, "question": "How many?", "url": "https://…"}, "27", "26"),
    ("gsm8k", {"question": "Clips?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 1,072"}, "1072", "24"),
    ("minerva", {"question": "Each of the two magnets?", "answer": "4.5e33"}, "4.5 \\times 10^{33}", "4.5"),
    ("olympiad", OLYMPIAD, "2, -2", "2"),
]


def asked(name: str, *rows: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    suite = suites()[name]
    return suite_rows.ask(Rows(list(rows), name), suite.form, suite.question, seed)


@pytest.mark.parametrize(("name", "row", "right", "wrong"), MATH, ids=[case[0] for case in MATH])
def test_a_row_of_mathematics(name: str, row: dict[str, Any], right: str, wrong: str) -> None:
    (found,) = asked(name, row)
    question = row.get("problem") or row["question"]
    assert found["prompt"] == f"{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    assert verify(found["answer"], f"So \\boxed{{{right}}}.").outcome is Outcome.CORRECT
    assert verify(found["answer"], f"So \\boxed{{{wrong}}}.").outcome is Outcome.WRONG


def test_options_of_gpqa_are_shuffled_by_the_seed_alone() -> None:
    rows = [GPQA | {"Question": f"Question {i}?"} for i in range(40)]
    found = asked("gpqa", *rows)
    assert found == asked("gpqa", *rows)
    assert found != asked("gpqa", *rows, seed=1)
    letters = [row["answer"] for row in found]
    assert set(letters) == set("ABCD")
    for row in found:
        assert f"{row['answer']}) 10^-4 eV" in row["prompt"].split("\n")
        assert verify(row["answer"], f"It is \\boxed{{{row['answer']}}}.").outcome is Outcome.CORRECT
        assert verify(row["answer"], f"It is \\boxed{{{'ABCD'.replace(row['answer'], '')[0]}}}.").reward == 0
    assert asked("gpqa", rows[7])[0]["answer"] == letters[7], "whatever rows are beside it"


@pytest.fixture(scope="module")
def workers():
    code.start(1)
    yield
    code.stop()


@pytest.mark.parametrize(
    ("row", "program"),
    [
        (MBPP, MBPP["code"]),
        (MBPP_SANITIZED, MBPP_SANITIZED["code"]),
        (MBPP_WITH_SETUP, "f = abs"),
    ],
)
def test_a_row_of_mbpp_is_judged_by_its_asserts(workers: None, row: dict[str, Any], program: str) -> None:
    (found,) = asked("mbpp", row)
    assert code_row(found) is None
    assert found["prompt"].count(row["test_list"][0]) == 1, "the first test is shown"
    assert verify_code(found["tests"], f"```python\n{program}\n```").outcome is Outcome.CORRECT
    name = json.loads(found["tests"])["fn_name"]
    assert verify_code(found["tests"], f"```python\ndef {name}(*a): return 'x'\n```").outcome is Outcome.WRONG


@pytest.mark.parametrize(
    ("row", "right", "wrong", "shown"),
    [
        (LIVECODEBENCH, "print(sum(map(int, input().split())))", "print(3)", "# YOUR CODE HERE"),
        (LEETCODE, f"{ADD}a + b", f"{ADD}3", "def add(self, a: int, b: int) -> int:"),
    ],
)
def test_a_row_of_livecodebench(workers: None, row: dict[str, Any], right: str, wrong: str, shown: str) -> None:
    (found,) = asked("livecodebench", row)
    assert shown in found["prompt"]
    assert "{" not in found["prompt"]
    args = suites()["livecodebench"].reward.args
    assert verify_code(found["tests"], f"```python\n{right}\n```", **args).outcome is Outcome.CORRECT
    assert verify_code(found["tests"], f"```python\n{wrong}\n```", **args).outcome is Outcome.WRONG


def test_humaneval_of_the_package_with_and_without_a_chat_template(workers: None) -> None:
    suite, rows = suites()["humaneval"], suite_rows.load(package="human-eval", hub="unused")
    assert rows.source == human_eval().source
    assert len(rows) == suite.rows.count
    first = Rows([rows[0]], rows.source)
    (chat,) = suite_rows.ask(first, suite.form, suite.question, 0)
    assert "has_close_elements" in chat["prompt"]
    assert suite.bare is not None
    (bare,) = suite_rows.ask(first, suite.form, suite.bare.question, 0)
    solution = rows[0]["canonical_solution"]
    begun = f"```python\n{bare['prompt']}\n{solution}\n```\n"
    assert verify_code(chat["tests"], begun, prefill="Below is:\n").outcome is Outcome.CORRECT
    how = {"prefill": bare["prompt"], "continues": suite.bare.stop}
    assert verify_code(bare["tests"], f"\n{solution}\ndef more(): 1 +", **how).outcome is Outcome.CORRECT
    assert verify_code(bare["tests"], f"\n    return False\nprint({solution!r})", **how).outcome is Outcome.WRONG
    assert verify_code(bare["tests"], f"\n{solution}", **how, status="length").outcome is Outcome.TRUNCATED
    assert verify_code(bare["tests"], "\n    return (\nprint(1)", **how).outcome is Outcome.UNPARSEABLE


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("math500", {"problem": "p"}, "no column 'solution'"),
        ("gsm8k", {"question": "q", "answer": "42"}, "must end in ####"),
        ("olympiad", {"question": "q", "final_answer": []}, "final_answer"),
        ("gpqa", {"Question": "q", "Correct Answer": "a"}, "Incorrect Answer 1"),
        ("mbpp", MBPP | {"test_list": ["assert other(1)"]}, "0 functions of the solution"),
        ("mbpp", MBPP | {"code": "def f(:"}, "no Python"),
        ("livecodebench", {"question_content": "q"}, "input_output"),
    ],
)
def test_a_row_that_is_not_of_the_form_is_named(name: str, row: dict[str, Any], says: str) -> None:
    good = {"math500": MATH[0][1], "gsm8k": MATH[4][1], "olympiad": OLYMPIAD, "gpqa": GPQA, "mbpp": MBPP}
    with pytest.raises(ValueError, match=rf"(?s)1 of 2 rows.*{name}:2: .*{says}"):
        asked(name, good.get(name, LIVECODEBENCH), row)


def test_a_name_that_the_form_does_not_know_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no \{answer\} in a row of form math"):
        suite_rows.ask(Rows([MATH[0][1]], "x"), "math", "{problem} {answer}", 0)
    (found,) = suite_rows.ask(Rows([{"prompt": "1+1", "answer": "2"}], "x"), "rows", "Q: {prompt} \\boxed{}", 0)
    assert found == {"prompt": "Q: 1+1 \\boxed{}", "answer": "2"}
