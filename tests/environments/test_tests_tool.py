"""The built-in tool ``tests``: public tests say what failed, hidden ones stay hidden and pay."""

from __future__ import annotations

import pytest

from grpo.environments.tests import WithTests
from rewards import code_workers

ROW = {"tests": {"fn_name": "add", "inputs": [[1, 2], [2, 2], [5, 7], [0, 9]], "outputs": [3, 4, 12, 9]}, "prompt": "…"}
RIGHT = "def add(a, b):\n    return a + b"


@pytest.fixture(scope="module", autouse=True)
def sandbox():
    before = dict(code_workers.settings)
    yield
    code_workers.stop()
    code_workers.settings.update(before)


def episode(*programs, row=ROW, **arguments):
    environment = WithTests(**arguments)
    environment.reset(**row)
    return [environment.run_tests(program) for program in programs], environment.get_reward()


@pytest.mark.slow
def test_failed_public_tests_are_told_and_the_last_program_is_paid():
    wrong = "def add(a, b):\n    return a * b"
    said, paid = episode(wrong, RIGHT)
    assert said == [
        "1 of 2 public tests failed.\nadd(1, 2): expected 3; returned 2, not 3",
        "All 2 public tests passed.",
    ]
    assert paid == 1.0
    assert episode(RIGHT, wrong)[1] == 0.0
    assert episode()[1] == 0.0


@pytest.mark.slow
def test_what_passes_the_public_tests_alone_is_not_paid_and_hidden_ones_are_never_told():
    known = "def add(a, b):\n    return {(1, 2): 3, (2, 2): 4}[a, b]"
    said, paid = episode(known)
    assert (said, paid) == (["All 2 public tests passed."], 0.0)
    assert episode(known, partial_credit=True)[1] == 0.0
    half = "def add(a, b):\n    return {(1, 2): 3, (2, 2): 4, (0, 9): 9}.get((a, b))"
    assert episode(half, partial_credit=True)[1] == 0.5
    assert episode(RIGHT, partial_credit=True)[1] == 1.0
    crashing = "def add(a, b):\n    raise ValueError(str(a))"
    (said,), paid = episode(crashing, public=3, max_shown=12)
    assert said.splitlines()[0] == "3 of 3 public tests failed."
    assert "ValueError" in said
    assert "9" not in said
    assert paid == 0.0


@pytest.mark.slow
def test_one_test_stays_hidden_and_scripts_and_broken_programs_are_told():
    script = {"tests": {"fn_name": None, "inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}}
    said, paid = episode("print('?')", "import os; os._exit(0)", "def f(:", row=script, public=9)
    assert said[0] == "1 of 1 public tests failed.\ninput '1 2\\n': expected '3\\n'; wrote ?\n, not 3\n"
    assert "no_result" in said[1]
    assert "unparseable" in said[2]
    assert paid == 0.0
    check = {"tests": {"fn_name": "add", "test": "def check(candidate):\n    assert candidate(1, 2) == 3"}}
    said, paid = episode(RIGHT, row=check)
    assert said == ["There are no public tests for this task. The program is kept as your answer."]
    assert paid == 1.0
    assert episode(RIGHT, public=0)[0] == said


def test_a_row_with_broken_tests_is_refused():
    with pytest.raises(ValueError, match="the row's column tests: tests must be an object, got NoneType"):
        WithTests().reset(prompt="…")
    with pytest.raises(ValueError, match="public: "):
        WithTests(public=-1)
