"""Pieces of code one after the other, which share their variables, as a notebook's cells do. In the sandbox's child.

A piece prints, and where its last statement is an expression its value is shown. What comes of it is one line of JSON:
``output`` and ``error``, the latter empty where nothing was raised, with the piece's number, counted from 1. ``exit()``
is an exception like others.
"""

from __future__ import annotations

import ast
import io
import json
import linecache
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

FRAMES = 3  # of a traceback, the innermost


def run(line: bytes, namespace: dict[str, Any], number: int, most: int) -> str:
    """Run the code of ``line``, a JSON string, and return the line that answers it. ``most`` characters of the output
    are kept."""
    code, kept, error = json.loads(line), _Kept(most), ""
    name = f"<cell {number}>"
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # for tracebacks
    with redirect_stdout(kept), redirect_stderr(kept):
        try:
            value = _value(code, name, namespace)
            if value is not None:
                kept.write(f"{value!r}\n")
        except BaseException as why:
            error = _told(why)[-most:]
    return json.dumps({"number": number, "output": kept.getvalue(), "error": error, "left_out": kept.left_out})


def _value(code: str, name: str, namespace: dict[str, Any]) -> Any:
    """Run it; the value of its last statement, where that is an expression."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec", dont_inherit=True), namespace)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), namespace)


def _told(why: BaseException) -> str:
    """The exception with the innermost of the code's own frames; nothing of this file's."""
    try:
        told = traceback.TracebackException.from_exception(why, capture_locals=False)
        told.stack = traceback.StackSummary.from_list(
            [f for f in told.stack if f.filename.startswith("<cell")][-FRAMES:]
        )
        told.__cause__ = told.__context__ = None
        return "".join(told.format()).rstrip()
    except BaseException:  # its __str__ is the program's own
        return type(why).__name__


class _Kept(io.StringIO):
    """The first ``most`` characters that are written, and how many others there were."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.room, self.left_out = most, 0

    def write(self, text: str) -> int:
        super().write(text[: self.room])
        self.left_out += max(0, len(text) - self.room)
        self.room = max(0, self.room - len(text))
        return len(text)
