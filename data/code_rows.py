r"""Published programming tasks turned into our rows: a prompt, and tests in one form.

Columns that are understood:
    HumanEval        prompt, entry_point, test
    APPS, TACO       question, starter_code, input_output: {"fn_name": …, "inputs": […], "outputs": […]} as JSON text
    LiveCodeBench    question_content, starter_code, public_test_cases, private_test_cases, metadata: {"func_name": …}

In ``tests``, ``fn_name`` is null for a program that reads standard input: ``inputs`` and ``outputs`` are then strings.
For a function ``inputs[i]`` is the list of its arguments, ``outputs[i]`` the value it returns.
"""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from collections.abc import Sequence
from typing import Any

from data import sources

HOW_TO_ANSWER = {
    "complete": "Complete this Python function. Answer with the whole of it, imports included, in one block that "
    "begins with ```python and ends with ```.",
    "function": "Write the Python function {name}. Answer with one block that begins with ```python and ends with ```.",
    "starter": "Complete this Python code; {name} is what is called. Answer with the whole of it in one block that "
    "begins with ```python and ends with ```.",
    "program": "Write a Python program that reads standard input and writes standard output. Answer with one block "
    "that begins with ```python and ends with ```.",
}


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """``prompt``, ``tests`` as a dictionary, ``solution`` (None where there is none), and ``difficulty`` in lower case
    (empty where not given).

    Raises ValueError where the row's tests can't be used.
    """
    if "entry_point" in row:
        return _human_eval_row(row)
    question = sources.text(row, "question", "question_content", "problem")
    starter = row.get("starter_code") or ""
    tests = _checked(_live_code_bench_tests(row) if "public_test_cases" in row else _tests(row))
    difficulty = str(row.get("difficulty") or "").lower()
    name = tests["fn_name"]
    how = HOW_TO_ANSWER["program" if name is None else "starter" if starter.strip() else "function"]
    block = f"```python\n{starter.strip()}\n```\n\n" if starter.strip() else ""
    return {
        "prompt": f"{question.strip()}\n\n{block}{how.replace('{name}', name or '')}\n",
        "tests": tests,
        "solution": _solution(row.get("solutions")),
        "difficulty": difficulty,
    }


def _human_eval_row(row: dict[str, Any]) -> dict[str, Any]:
    prompt, test, name = (sources.text(row, column) for column in ("prompt", "test", "entry_point"))
    # setup: some tests call helper functions that the prompt defines
    tests = {"fn_name": name, "test": test, "setup": prompt, "inputs": [], "outputs": []}
    return {
        "prompt": f"{HOW_TO_ANSWER['complete']}\n\n```python\n{prompt.strip()}\n```\n",
        "tests": tests,
        "solution": prompt + row["canonical_solution"] if row.get("canonical_solution") else None,
        "difficulty": "",
    }


def _solution(solutions: Any) -> str | None:
    """The first of APPS' and TACO's ``solutions``, a list or its JSON text (empty text where there are none)."""
    if isinstance(solutions, str):
        solutions = _json(solutions, "solutions") if solutions.strip() else None
    return solutions[0] if isinstance(solutions, list) and solutions and isinstance(solutions[0], str) else None


def _tests(row: dict[str, Any]) -> dict[str, Any]:
    tests = row.get("input_output", row.get("tests"))
    if isinstance(tests, str):
        tests = _json(tests, "input_output")
    if not isinstance(tests, dict):
        raise ValueError("column 'input_output' is no object with inputs and outputs")
    ours = {"fn_name": tests.get("fn_name") or None, "inputs": tests.get("inputs"), "outputs": tests.get("outputs")}
    return ours | {key: tests[key] for key in HOW_TO_COMPARE if tests.get(key)}


def _live_code_bench_tests(row: dict[str, Any]) -> dict[str, Any]:
    """LiveCodeBench writes a function's arguments as JSON, one a line."""
    cases = _json(row["public_test_cases"], "public_test_cases") + _private_cases(row.get("private_test_cases") or "[]")
    name = _json(row.get("metadata") or "{}", "metadata").get("func_name")
    try:
        inputs, outputs = [case["input"] for case in cases], [case["output"] for case in cases]
    except (TypeError, KeyError) as error:
        raise ValueError("a test case is no object with input and output") from error
    if name:
        inputs = [[_json(line, "input") for line in text.split("\n") if line.strip()] for text in inputs]
        outputs = [_json(text, "output") for text in outputs]
    return {"fn_name": name, "inputs": inputs, "outputs": outputs}


class _TextOnly(pickle.Unpickler):
    """Loads text and numbers. A pickle can run code only by naming a class or function, so such a pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _private_cases(text: str) -> list[Any]:
    """JSON text, or that same text pickled, compressed and written in base64."""
    if not text.lstrip().startswith("["):
        try:
            text = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text)))).load()
        except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, IndexError, AttributeError) as error:
            raise ValueError(f"column 'private_test_cases' can't be unpacked: {error}") from error
    cases = _json(text, "private_test_cases")
    if not isinstance(cases, list):
        raise ValueError("column 'private_test_cases' is no list")
    return cases


HOW_TO_COMPARE = ("comparison", "tolerance", "checker")  # as ``rewards/code_tests.py`` reads them


def _checked(tests: dict[str, Any]) -> dict[str, Any]:
    """The tests in our form. Raises ValueError if no program could pass them, or if they test nothing."""
    name, inputs, outputs = tests["fn_name"], tests["inputs"], tests["outputs"]
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"fn_name is {name!r}, no name of a function")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("tests need the lists inputs and outputs")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs: need as many, and at least one")
    if name is None:
        return tests | {"inputs": [*map(_lines, inputs)], "outputs": [*map(_lines, outputs)]}
    if not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError(f"an input of {name} is no list of arguments")
    try:
        json.dumps(tests, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"a value that equals nothing, NaN or infinity, in the tests of {name}") from error
    return tests


def _lines(text: Any) -> str:
    """A program's input or output as text; some rows hold a list of lines."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        return "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"fn_name is null, so inputs and outputs must be text, and one is {text!r}"[:200])
    return text


def is_wrapped(outputs: Sequence[Any]) -> bool:
    """Whether every expected value is a list of one."""
    return all(isinstance(output, list) and len(output) == 1 for output in outputs)


def unwrap(outputs: Sequence[Any]) -> list[Any]:
    return [output[0] for output in outputs]


def _json(text: Any, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"column {column!r} is not valid JSON: {error}"[:200]) from error
