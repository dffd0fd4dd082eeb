"""Which program a completion answers with, as docs/rewards.md tells it in a table, and beyond."""

from __future__ import annotations

import pytest

from rewards.code_text import extract_program
from rewards.tags import NoAnswer
from tests.rewards.tables import table_of

PROGRAM = "def f(x):\n    return {!r}"


@pytest.mark.parametrize(("written", "read"), table_of("which block", 2), ids=str)
def test_the_table_of_blocks(written: str, read: str) -> None:
    text = written.replace("⏎", "\n")
    for name in "AB":
        text = text.replace(f"\n{name}\n", f"\n{PROGRAM.format(name)}\n")
    try:
        found = extract_program(text, "f")
    except NoAnswer:
        found = "none"
    name, *more = read.split(", ")
    assert found.strip() == (read if read == "none" else "\n".join([PROGRAM.format(name), *more])), text


PY = "```python\nx = 1\n```"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```{.python}\nx = 1\n```", "x = 1\n"),
        ("```python:main.py\nx = 1\n```", "x = 1\n"),
        ("```Python 3\nx = 1\n```", "x = 1\n"),
        ("```pycon\n>>> 1\n```\n" + PY, "x = 1\n"),
        (PY + "\n```pycon\n>>> 1\n```", "x = 1\n"),
        (PY + "\n```\nx = 1\nTotal: 5\nfor example\n```", "x = 1\n"),
        (PY + "\n```\ny = 2\nprint(y)\n```", "y = 2\nprint(y)\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("<think>a</think><answer>```python\nx = 1\n```</answer>", "x = 1\n"),
        ("<answer> ```python\nx = 1\n``` </answer>", "x = 1\n"),
        ("<answer>```python\nx = 1\ny = 2```</answer>", "x = 1\ny = 2\n"),
        ("```python\nx = 1```\nThat is it.", "x = 1\n"),
        ("**Solution:**```python\nx = 1\n```", "x = 1\n"),
        ("~~~~py\nx = '''\n~~~\n```\n'''\n~~~~", "x = '''\n~~~\n```\n'''\n"),
        ("```python\nx = 1\n`````", "x = 1\n"),
        ("````\n```python\nx = 1\n```\n````", "```python\nx = 1\n```\n"),
    ],
)
def test_fences_as_models_write_them(text: str, program: str) -> None:
    assert extract_program(text) == program


def test_a_block_that_defines_the_function_comes_before_an_example_of_its_use() -> None:
    text = "```python\ndef f(x): return x\n```\n```python\nprint(f(1))\n```"
    assert extract_program(text, "f") == "def f(x): return x\n"
    assert extract_program(text) == "print(f(1))\n"
    method = "```python\nclass Solution:\n    def f(self, x): return x\n```\n```python\nSolution().f(2)\n```"
    assert extract_program(method, "f").startswith("class")
    assert extract_program(text.replace("def f(x): return x", "f = lambda x: x"), "f") == "f = lambda x: x\n"
    assert extract_program("```python\ndef f(x): return 1\n```\n```python\ndef f(x): return 2\n```", "f")[-2] == "2"


@pytest.mark.parametrize("text", ["```python\nx = 1\n~~~", "````python\nx = 1\n```", PY + "\n```python\ny = 2"])
def test_a_block_is_closed_by_its_own_kind_of_fence(text: str) -> None:
    with pytest.raises(NoAnswer, match="not closed"):
        extract_program(text)
