"""What happens in the child of one run: a model's program, and answers on the channel.

Five modes. ``calls``: the program gets calls and answers them. ``script``: it reads a standard input and writes its
output straight into the channel. ``session``: it gets pieces of code one after the other, which share their variables
(``cells.py``). In the other two not a model's program runs but a data set's own. ``judge``: a test, with the function
that it tests behind the channel. ``checker``: what says whether an answer is right. Calls and answers are lines:

    call NAME ARGUMENTS   value VALUE   failed KIND MESSAGE   loaded   passed   accepted   refused

with ARGUMENTS and VALUE as ``values.py`` writes them. A program that has started owns the child and may change whatever
is written here. So nothing here decides anything, and no expected output is in a program's memory.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import json
import os
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, BinaryIO

from rewards.sandbox import cells, prelude, values

HEADER = struct.Struct("=QQQ")  # sizes of mode, source and the mode's input
LOADED, PASSED, ACCEPTED, REFUSED = "loaded", "passed", "accepted", "refused"
IN_ORDER = "in order"  # the input of ``calls``: answers keep the order of dictionaries, since a test will see them
MAX_MESSAGE = 300

# What an exception says of a program: it wanted too much, it wanted something that is not here, it exited, it is not
# Python. All others are "error".
KINDS = (("limit", (MemoryError, RecursionError)), ("denied", OSError), ("exit", SystemExit), ("syntax", SyntaxError))
EXIT_STATUS = {"limit": 101, "denied": 102, "exit": 0, "syntax": 103, "error": 1}  # of a script: its channel is in use


@dataclass(frozen=True)
class Request:
    """``input``: a script's standard input; for a judge the name of the function that it tests; for calls ``IN_ORDER``
    or nothing; for a checker what it judges, ``calls`` or ``script``; for a session how many characters an answer may
    have."""

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


def value_line(value: Any, in_order: bool = False) -> str:
    return f"value {values.encode_in_order(value) if in_order else values.encode(value)}"


def check_line(given: Any, answer: str, expected: Any) -> str:
    """What a checker is asked: a test's input, the text that came out of the program, and the expected output."""
    return values.encode_in_order([given, answer, expected])


def serve(channel: int, request: Request) -> None:
    """Run the program; does not return. It ends by ``os._exit``: nothing shall delay the end of a function's run."""
    if request.mode == "script":
        os._exit(_run_script(request.source))
    lines = open(channel, "rb", closefd=False)  # noqa: SIM115
    if request.mode == "judge":
        _judge(channel, lines, request)
    elif request.mode == "checker":
        _check_answers(channel, lines, request)
    elif request.mode == "session":
        namespace = _namespace("__main__")
        for number, line in enumerate(lines, 1):
            _send(channel, cells.run(line, namespace, number, int(request.input)))
    else:
        _answer_calls(channel, lines, request)
    os._exit(0)


def _run_script(source: str) -> int:
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # type: ignore[misc] # noqa: SIM115
    out = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = out  # type: ignore[misc]
    prelude.bind_streams()
    atexit._clear()  # what was registered before the program is not its own
    status = 0
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), _namespace("__main__"))
    except BaseException as why:
        status = EXIT_STATUS[_kind(why)]
    # As an interpreter ends: threads that nobody joined, what atexit has, and only then what is still in buffers.
    for end in (threading._shutdown, atexit._run_exitfuncs, lambda: sys.stdout.flush(), out.flush):  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            end()
    return status


def _answer_calls(channel: int, lines: BinaryIO, request: Request) -> None:
    """Write a line that says whether the program could be loaded, then a line for every call."""
    namespace, in_order = _namespace("solution"), request.input == IN_ORDER

    def load() -> str:
        exec(compile(request.source, "<program>", "exec", dont_inherit=True), namespace)
        return LOADED

    loaded = _outcome(load)
    _send(channel, loaded)
    if loaded == LOADED:
        for line in lines:
            _send(channel, _outcome(partial(_called, namespace, line, in_order)))


def _called(namespace: dict[str, Any], line: bytes, in_order: bool) -> str:
    """The answer to a call of a plain function or, if there is none, of a method of a class ``Solution``."""
    _, name, arguments = line.decode().split(" ", 2)
    positional, named = values.decode(arguments)
    if name in namespace:
        function = namespace[name]
    elif "Solution" in namespace:
        function = getattr(namespace["Solution"](), name)
    else:
        raise NameError(f"the program defines no {name!r}")
    return value_line(function(*positional, **named), in_order)


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
    """The exception that a program raised, as far as its message tells: a test may expect a ValueError.

    One that ends an iteration would end the test's own (``map``, ``zip``, ``next``), and what was not compared would
    count as right. It becomes a RuntimeError, as Python makes it in a generator.
    """
    text = str(json.loads(message or '""'))
    kind: Any = getattr(builtins, text.partition(":")[0], None)
    usable = isinstance(kind, type) and issubclass(kind, Exception)
    if not usable or issubclass(kind, (StopIteration, StopAsyncIteration)):
        return RuntimeError(f"the program failed: {text}")
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError and others want more
        bare: BaseException = kind.__new__(kind)
        bare.args = (text,)
        return bare


def _check_answers(channel: int, lines: BinaryIO, request: Request) -> None:
    """Run a checker that defines ``check(input, output, expected)``: a line for every answer that it is asked about."""
    namespace = _namespace("checker")

    def load() -> str:
        exec(compile(request.source, "<checker>", "exec", dont_inherit=True), namespace)
        return LOADED

    def judge(line: bytes) -> str:
        given, answer, expected = values.decode(line)
        output = values.decode(answer) if request.input == "calls" else answer
        said = namespace["check"](given, output, expected)
        if type(said) not in (bool, int, float):
            raise TypeError(f"check returned {type(said).__name__}; expected True or False")
        return ACCEPTED if said >= 1 else REFUSED

    loaded = _outcome(load)
    _send(channel, loaded)
    if loaded == LOADED:
        for line in lines:
            _send(channel, _outcome(partial(judge, line)))


def _namespace(name: str) -> dict[str, Any]:
    """The names of a new module that imports find: dataclasses, pickles and type hints look there."""
    module = sys.modules[name] = ModuleType(name)
    return vars(module)


def _outcome(act: Callable[[], str]) -> str:
    """The line that ``act`` returns, or one that tells how it failed."""
    try:
        return act()
    except BaseException as why:
        return f"failed {_kind(why)} {json.dumps(_told(why)[:MAX_MESSAGE])}"


def _told(why: BaseException) -> str:
    """An exception in words. Of a class of the program's own, the built-in one that it derives from comes first."""
    name = type(why).__name__
    known = next((c.__name__ for c in type(why).__mro__ if getattr(builtins, c.__name__, None) is c), name)
    return f"{name}: {why}" if known in (name, "Exception", "BaseException") else f"{known}: {name}: {why}"


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
