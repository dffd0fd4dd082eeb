"""What happens in the child of one run: a model's program, and answers on the channel.

Three modes. ``calls``: the program gets calls and answers them. ``script``: it reads a standard input and writes its
output straight into the channel. ``judge``: not a model's program but a data set's own test runs here, with the
function that it tests behind the channel. Calls and answers are lines:

    call NAME ARGUMENTS   value VALUE   failed KIND MESSAGE   loaded   passed

with ARGUMENTS and VALUE as ``values.py`` writes them. A program that has started owns the child and may change whatever
is written here. So nothing here decides anything, and no expected output is in a program's memory.
"""

from __future__ import annotations

import builtins
import json
import os
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, BinaryIO

from rewards.sandbox import values

HEADER = struct.Struct("=QQQ")  # sizes of mode, source and the mode's input
LOADED, PASSED = "loaded", "passed"
MAX_MESSAGE = 300
# Names that LeetCode and similar sites put before a solution: `List[int]` and `Counter` need no import here either.
PRELUDE = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import bisect_left, bisect_right
from collections import Counter, OrderedDict, defaultdict, deque
from functools import cache, cmp_to_key, lru_cache, reduce
from heapq import heapify, heappop, heappush
from itertools import accumulate, combinations, permutations, product
from math import ceil, comb, factorial, floor, gcd, inf, isqrt, sqrt
from typing import *
"""

# What an exception says of a program: it wanted too much, it wanted something that is not here, it exited, it is not
# Python. All others are "error".
KINDS = (("limit", (MemoryError, RecursionError)), ("denied", OSError), ("exit", SystemExit), ("syntax", SyntaxError))
EXIT_STATUS = {"limit": 101, "denied": 102, "exit": 0, "syntax": 103, "error": 1}  # of a script: its channel is in use


@dataclass(frozen=True)
class Request:
    """``input``: a script's standard input; for a judge the name of the function that it tests."""

    mode: str
    source: str
    input: str = ""


def pack(request: Request) -> bytes:
    parts = [text.encode("utf-8", "surrogatepass") for text in (request.mode, request.source, request.input)]
    return HEADER.pack(*map(len, parts)) + b"".join(parts)


def receive(channel: int) -> Request:
    sizes = HEADER.unpack(_read(channel, HEADER.size))
    return Request(*(_read(channel, size).decode("utf-8", "surrogatepass") for size in sizes))


def call_line(function: str, *arguments: Any, **named: Any) -> str:
    return f"call {function} {values.encode_in_order([list(arguments), named])}"


def value_line(value: Any) -> str:
    return f"value {values.encode(value)}"


def serve(channel: int, request: Request) -> None:
    """Run the program; does not return. It ends by ``os._exit``: no atexit and no thread shall delay the end."""
    if request.mode == "script":
        os._exit(_run_script(request.source))
    lines = open(channel, "rb", closefd=False)  # noqa: SIM115
    if request.mode == "judge":
        _judge(channel, lines, request)
    else:
        _answer_calls(channel, lines, request.source)
    os._exit(0)


def _run_script(source: str) -> int:
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    status = 0
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), _namespace("__main__"))
    except BaseException as why:
        status = EXIT_STATUS[_kind(why)]
    sys.stdout.flush()
    return status


def _answer_calls(channel: int, lines: BinaryIO, source: str) -> None:
    """Write a line that says whether the program could be loaded, then a line for every call."""
    namespace = _namespace("solution")

    def load() -> str:
        exec(compile(source, "<program>", "exec", dont_inherit=True), namespace)
        return LOADED

    loaded = _outcome(load)
    _send(channel, loaded)
    if loaded == LOADED:
        for line in lines:
            _send(channel, _outcome(partial(_called, namespace, line)))


def _called(namespace: dict[str, Any], line: bytes) -> str:
    """The answer to a call of a plain function or, if there is none, of a method of a class ``Solution``."""
    _, name, arguments = line.decode().split(" ", 2)
    positional, named = values.decode(arguments)
    if name in namespace:
        function = namespace[name]
    elif "Solution" in namespace:
        function = getattr(namespace["Solution"](), name)
    else:
        raise NameError(f"the program defines no {name!r}")
    return value_line(function(*positional, **named))


def _judge(channel: int, lines: BinaryIO, request: Request) -> None:
    """Run a test that defines ``check(candidate)``; every call of the candidate goes over the channel."""

    def candidate(*arguments: Any, **named: Any) -> Any:
        _send(channel, call_line(request.input, *arguments, **named))
        what, _, rest = lines.readline().decode().rstrip("\n").partition(" ")
        if what == "value":
            return values.decode(rest)
        raise _exception(rest.partition(" ")[2])

    def check() -> str:
        namespace = _namespace("test")
        exec(compile(request.source, "<test>", "exec", dont_inherit=True), namespace)
        namespace[request.input] = candidate
        namespace["check"](candidate)
        return PASSED

    _send(channel, _outcome(check))


def _exception(message: str) -> BaseException:
    """The exception that a program raised, as far as its message tells: a test may expect a ValueError."""
    text = str(json.loads(message or '""'))
    kind = getattr(builtins, text.partition(":")[0], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind(text)
    return RuntimeError(f"the program failed: {text}")


@cache
def prelude() -> dict[str, Any]:
    """The names of PRELUDE. A zygote calls this once, so that its children have them."""
    namespace: dict[str, Any] = {}
    exec(PRELUDE, namespace)
    return namespace


def _namespace(name: str) -> dict[str, Any]:
    return {**prelude(), "__name__": name}


def _outcome(act: Callable[[], str]) -> str:
    """The line that ``act`` returns, or one that tells how it failed."""
    try:
        return act()
    except BaseException as why:
        return f"failed {_kind(why)} {json.dumps(f'{type(why).__name__}: {why}'[:MAX_MESSAGE])}"


def _kind(why: BaseException) -> str:
    if isinstance(why, RuntimeError) and "start new thread" in str(why):
        return "limit"
    return next((kind for kind, classes in KINDS if isinstance(why, classes)), "error")


def _send(channel: int, line: str) -> None:
    data = line.encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def _read(channel: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(channel, min(size, 1 << 20))
        if not part:
            raise EOFError("the channel ended before the request did")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
