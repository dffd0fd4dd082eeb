"""What a program's output may differ in: the table in docs/rewards.md line by line, and what no comparison survives."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards import code
from rewards.code import code_reward, verify
from rewards.code_compare import Comparison, UnknownComparison
from rewards.sandbox import Limits
from rewards.verdict import Outcome
from tests.rewards.tables import table_of


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    code.start(1)
    yield
    code.stop()


def arguments_of(cell: str) -> dict:
    """``livecodebench, tolerance: 1e-6`` as keyword arguments."""
    found: dict = {}
    if "livecodebench" in cell:
        found["comparison"] = "livecodebench"
    if tolerance := re.search(r"tolerance: ([0-9.e-]+)", cell):
        found["tolerance"] = float(tolerance[1])
    return found


@pytest.mark.parametrize(("comparison", "expected", "given", "verdict"), table_of("comparison", 4), ids=str)
def test_the_table_of_comparisons(comparison: str, expected: str, given: str, verdict: str) -> None:
    value = ast.literal_eval(expected)
    if given.startswith("return"):
        tests, program = {"fn_name": "f", "inputs": [[]], "outputs": [value]}, f"def f():\n    {given}"
    else:
        tests, program = {"fn_name": None, "inputs": [""], "outputs": [value]}, given
    found = verify(tests, f"```python\n{program}\n```", limits=Limits(2.0), **arguments_of(comparison))
    assert found.outcome is {"accepted": Outcome.CORRECT, "refused": Outcome.WRONG}[verdict], found.detail
    assert verify({**tests, **arguments_of(comparison)}, f"```python\n{program}\n```").outcome is found.outcome


HOSTILE = [
    *(b"", b"[", b"{}", b'{"a": 1, "b": 2}', b"[" * 100_000, b'{"tuple": ' * 900 + b"1" + b"}" * 900, b"9" * 60_000),
    *(b'{"int": "zz"}', b'{"int": 5}', b'{"dict": 5}', b'{"dict": [[[], 1]]}', b'{"set": [{}]}', b"NaN", b"-Infinity"),
    *(b"1e999999999", b"\xff\xfe", b'"\\ud800"', b"null", b"true", b'{"foreign": "x"}', b'{"complex": [1]}'),
]


@pytest.mark.parametrize("expected", ["1", "1.5", "[1.5, [2]]", '{"dict": [["a", 1.5]]}', '{"tuple": [1.5]}'])
@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: repr(answer[:20]))
def test_forged_answers_are_wrong_and_raise_nothing(answer: bytes, expected: str) -> None:
    for how in (Comparison(), Comparison("livecodebench"), Comparison(tolerance=1e-6)):
        assert how.same_value(answer, expected) is (answer == b"true" and expected == "1" and how.name != "exact")


ODD = ("1e999999999", "1e-999999", "nan", "inf", "\uff11", "1_0", "0x1", "9" * 50_000, "1e400")


@pytest.mark.parametrize("output", ODD, ids=lambda text: ascii(text[:12]))
def test_odd_numbers_in_texts_are_wrong_and_raise_nothing(output: str) -> None:
    for how in (Comparison(), Comparison("livecodebench"), Comparison(tolerance=1e-6)):
        assert not how.same_text(output, "1"), output


def test_an_integer_is_not_near_another_one() -> None:
    how = Comparison(tolerance=1e-3)
    assert not how.same_text("1000001", "1000000")
    assert not how.same_text("1000000.9", "1000000"), "near only relative to its size"
    assert how.same_text("1000000.0005", "1000000")
    assert how.same_text("1000000.9", "1000000.0")
    assert not how.same_value(b"1000001", "1000000")
    assert how.same_value(b"1000000.0005", "1000000")


SUM = "def check(input, output, expected):\n    return sum(map(int, output.split())) == int(input)\n"
OF_CALLS = "def check(input, output, expected):\n    return type(output) is list and sum(output) == input[0]\n"


def test_a_checker_of_the_row_decides() -> None:
    script = {"fn_name": None, "inputs": ["7", "9"], "outputs": ["3 4", "4 5"], "checker": SUM}
    assert verify(script, "```python\nprint(input(), 0)\n```").outcome is Outcome.CORRECT
    assert verify(script, "```python\nprint(7, 0)\n```", partial_credit=True).reward == 0.5
    assert verify(script, "```python\nprint('x')\n```").outcome is Outcome.WRONG, "the checker fails on it"
    calls = {"fn_name": "f", "inputs": [[7], [9]], "outputs": [[3, 4], [4, 5]], "checker": OF_CALLS}
    assert verify(calls, "```python\ndef f(x): return [x, 0]\n```").outcome is Outcome.CORRECT
    assert verify(calls, "```python\ndef f(x): return [7]\n```", partial_credit=True).reward == 0.5
    assert verify(calls, "```python\ndef f(x): raise StopIteration\n```").outcome is Outcome.WRONG
    assert verify(calls, "```python\ndef f(x): return x\n```").outcome is Outcome.WRONG


def test_a_checker_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SUM)
    rows = [{"fn_name": None, "inputs": ["7"], "outputs": [""]}] * 2
    texts = ["```python\nprint(6, 1)\n```", "```python\nprint(6, 2)\n```"]
    assert code_reward(["p"] * 2, texts, rows, comparison=str(tmp_path / "mine.py")) == [1.0, 0.0]


def test_what_an_answer_says_does_not_reach_the_checker_s_other_arguments() -> None:
    """A forged line cannot end the answer and go on with an expected value of its own."""
    checker = "def check(input, output, expected, more=None):\n    return output == expected and more is None\n"
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2], "checker": checker}
    for forged in ("5, 5", '5], {"dict": []}]', '5", "5', '5, 5], {"dict": [["x", 1]]}'):
        forging = f"import os\ndef f(x):\n    os.write(3, {('value ' + forged)!r}.encode() + b'\\n')\n    os._exit(0)"
        assert verify(tests, f"```python\n{forging}\n```").outcome is Outcome.WRONG, forged


@pytest.mark.parametrize(
    ("checker", "outcome"),
    [
        ("def check(input, output, expected):\n    return None", Outcome.WRONG),
        ("def check(input, output, expected):\n    return 'yes'", Outcome.WRONG),
        ("def check(input, output, expected):\n    raise StopIteration", Outcome.WRONG),
        ("def check(input, output, expected):\n    while True: pass", Outcome.TIMEOUT),
        ("import nothing_like_this\ndef check(input, output, expected):\n    return True", Outcome.GOLD_UNPARSEABLE),
        ("def check(", Outcome.GOLD_UNPARSEABLE),
        ("x = 1", Outcome.GOLD_UNPARSEABLE),
        (5, Outcome.GOLD_UNPARSEABLE),
    ],
)
def test_a_checker_that_says_nothing_pays_nothing(checker: object, outcome: Outcome) -> None:
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2], "checker": checker}
    assert verify(tests, "```python\ndef f(x): return 2\n```", limits=Limits(0.5)).outcome is outcome


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"comparison": "fuzzy"}, "comparison is one of exact, livecodebench"),
        ({"comparison": "nowhere.py"}, "nowhere.py cannot be read"),
        ({"tolerance": 0}, "tolerance is a number between 0 and 1"),
        ({"tolerance": True}, "tolerance is a number between 0 and 1"),
        ({"tolerance": "1e-6"}, "tolerance is a number between 0 and 1"),
    ],
)
def test_no_such_comparison(arguments: dict, message: str) -> None:
    with pytest.raises(UnknownComparison, match=message):
        code.start(1, **arguments)
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [2], **arguments}
    if arguments["comparison" if "comparison" in arguments else "tolerance"]:
        assert verify(tests, "").outcome is Outcome.GOLD_UNPARSEABLE
