"""Code: model-written Python against tests, in the sandbox, judged outside of it.

The program is the last fenced Python block after the thinking. It is run (``rewards/sandbox``), it answers, and the
answers are compared here, with their exact types; it never meets the expected ones. How it exits does not count, only
that every test has its answer.
"""

from __future__ import annotations

import os
import re
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rewards.code_tests import BrokenTests, Calls, Check, Script, Tests, parse_tests
from rewards.sandbox import Ended, Limits, Run, Sandbox, probed_sandbox, values
from rewards.sandbox.program import EXIT_STATUS, Request
from rewards.tags import NoAnswer, after_thinking, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

MAX_PROGRAM = 1 << 16  # characters
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*$|```", re.MULTILINE)
PYTHON = frozenset({"python", "python3", "py"})
LOADED = {"loaded": True}
FAILURES = {
    "limit": Outcome.LIMIT,
    "denied": Outcome.DENIED,
    "exit": Outcome.NO_RESULT,
    "syntax": Outcome.UNPARSEABLE,
}


def verify(
    tests: Any,
    completion: str,
    *,
    prefill: str = "",
    status: str = "stop",
    partial_credit: bool = False,
    limits: Limits | None = None,
) -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``tests``: see ``rewards/code_tests.py``. With ``partial_credit`` the score is the share of tests passed, else all
    or nothing. ``limits.seconds`` is for all calls of a function together, or for each standard input.

    Raises:
        SandboxUnavailable: there is no way here to run the program safely.
    """
    try:
        parsed = parse_tests(tests)
    except BrokenTests as why:
        return Verdict(Outcome.GOLD_UNPARSEABLE, str(why))
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        program = extract_program(prefill + completion)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))
    results = run_tests(parsed, program, limits or Limits())
    if any(result.outcome is Outcome.ERROR for result in results):
        results = run_tests(parsed, program, limits or Limits())
    return _summary(results, partial_credit)


def code_reward(
    prompts: list[Any],
    completions: list[Any],
    tests: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    *,
    partial_credit: bool = False,
    timeout: float = 6.0,
    memory_mb: int = 1024,
    allow_unsafe: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the program passes every test, 0 where not, None where the row's own ``tests`` are broken.

    TRL's signature: lists with one entry a completion. ``timeout`` is in seconds, ``memory_mb`` a program's address
    space, ``partial_credit`` pays the share of tests passed, ``allow_unsafe`` runs even where nothing isolates.
    """
    n = len(completions)
    limits = Limits(timeout, memory_mb)
    start(allow_unsafe=allow_unsafe)
    judge = partial(verify, partial_credit=partial_credit, limits=limits)
    with ThreadPoolExecutor(min(n, os.cpu_count() or 1) or 1) as threads:
        verdicts = list(
            threads.map(
                lambda job: judge(job[0], job[1], prefill=job[2], status=job[3]),
                zip(tests, map(text_of, completions), prefill or [""] * n, status or ["stop"] * n, strict=True),
            )
        )
    return rewards_of(verdicts, kwargs.get("log_verdict"))


# --- the program -----------------------------------------------------------------------------------------------------


def extract_program(text: str) -> str:
    """The last fenced Python block after the thinking, without the indentation that all of it shares.

    A fence opens with three backticks and, on the same line, ``python``, ``py`` or nothing. Raises NoAnswer where there
    is no closed one, or the program is empty or longer than MAX_PROGRAM.
    """
    blocks, opened = [], None
    answer = after_thinking(text)
    for fence in FENCE.finditer(answer):
        if opened is None:
            if fence[1] is not None:
                opened = fence
        else:
            if opened[1].lower() in PYTHON | {""}:
                blocks.append(answer[opened.end() : fence.start()])
            opened = None
    if opened is not None:
        raise NoAnswer("the last code block is not closed")
    if not blocks:
        raise NoAnswer("no fenced Python block after the thinking")
    program = textwrap.dedent(blocks[-1].strip("\n")).rstrip()
    if not program.strip():
        raise NoAnswer("the program is empty")
    if len(program) > MAX_PROGRAM:
        raise NoAnswer(f"a program of {len(program)} characters, more than {MAX_PROGRAM}")
    return program + "\n"


# --- tests -----------------------------------------------------------------------------------------------------------


def run_tests(tests: Tests, program: str, limits: Limits) -> list[Verdict]:
    """A verdict for every test; the first one not correct says why a program fails. At least one."""
    if isinstance(tests, Calls):
        return _run_calls(tests, program, limits)
    if isinstance(tests, Script):
        return [
            _run_script(program, given, expected, limits)
            for given, expected in zip(tests.inputs, tests.outputs, strict=True)
        ]
    return [_run_check(tests, program, limits)]


def _run_calls(tests: Calls, program: str, limits: Limits) -> list[Verdict]:
    answers: list[dict[str, Any]] = []
    size, wanted = sum(len(values.encode(output)) for output in tests.outputs), len(tests.outputs)
    with _sandbox().run(Request("calls", program), _room_for(size, limits)) as run:
        for arguments in tests.inputs:
            run.send(_line({"function": tests.fn_name, "arguments": arguments}))
        run.finish_sending()
        loaded = _answer(run)
        if loaded == LOADED:
            while len(answers) < wanted and (answer := _answer(run)) is not None:
                answers.append(answer)
        surplus = len(answers) == wanted and bool(run.rest())
    if loaded is not None and loaded != LOADED:
        return [_failed(loaded)] * wanted
    if surplus:  # forged, and nobody knows which lines
        return [Verdict(Outcome.NO_RESULT, "more answers than calls")] * wanted
    results = [_compare(answer, expected) for answer, expected in zip(answers, tests.outputs, strict=False)]
    return results + [_ending(run)] * (wanted - len(results))


def _compare(answer: dict[str, Any], expected: Any) -> Verdict:
    if answer.keys() != {"value"}:
        return _failed(answer)
    if values.same(answer["value"], expected):
        return Verdict(Outcome.CORRECT)
    return Verdict(Outcome.WRONG, f"returned {_brief(answer['value'])}, not {_brief(expected)}")


def _run_script(program: str, given: str, expected: str, limits: Limits) -> Verdict:
    with _sandbox().run(Request("script", program, given), _room_for(len(expected), limits)) as run:
        output = run.rest()
    if run.ended is Ended.EXITED:
        if _lines(output.decode("utf-8", "replace")) == _lines(expected):
            return Verdict(Outcome.CORRECT)
        failure = next((kind for kind, code in EXIT_STATUS.items() if code == run.status and kind in FAILURES), "")
        if run.status and failure:
            return Verdict(FAILURES[failure], "as the program says by its exit status")
        if output.strip():
            return Verdict(Outcome.WRONG, f"wrote {_brief(output[:100])}, not {_brief(expected)}")
    return _ending(run)


def _lines(text: str) -> list[str]:
    """Output as it is compared: without blanks at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run_check(tests: Check, program: str, limits: Limits) -> Verdict:
    """The data set's test in a run of its own, in the sandbox too; the program's function answers it from another."""
    limits = _room_for(1 << 20, limits)
    with _sandbox().run(Request("calls", program), limits) as run:
        loaded = _answer(run)
        if loaded is not None and loaded != LOADED:
            return _failed(loaded)
        with _judges().run(Request("judge", tests.source, tests.fn_name), limits) as judge:
            while loaded and (message := _answer(judge)) is not None:
                if message == {"passed": True}:
                    return Verdict(Outcome.CORRECT)
                if message.keys() != {"ask"}:
                    return Verdict(Outcome.WRONG, _brief(message.get("message")))
                run.send(_line({"function": tests.fn_name, "arguments": message["ask"]}))
                answer = _answer(run)
                if answer is None:
                    break
                if answer.keys() != {"value"}:
                    return _failed(answer)
                judge.send(_line(answer))
    return _ending(run)


def _answer(run: Run) -> dict[str, Any] | None:
    """The next message of a run; None where none comes, a nonsensical one included."""
    line = run.line()
    if line is None:
        return None
    try:
        message = values.decode(line)
    except values.Malformed:
        return None
    return message if isinstance(message, dict) and message else None


def _failed(message: dict[str, Any]) -> Verdict:
    """What a program says of its own failure."""
    return Verdict(FAILURES.get(str(message.get("failed")), Outcome.WRONG), _brief(message.get("message")))


def _ending(run: Run) -> Verdict:
    """Why a run gave no (further) answer."""
    if run.ended is Ended.TIMEOUT:
        return Verdict(Outcome.TIMEOUT)
    if run.ended is Ended.OUTPUT:
        return Verdict(Outcome.LIMIT, "too much output")
    if run.ended is Ended.LOST:
        return Verdict(Outcome.ERROR, "the sandbox lost the run")
    if run.ended is Ended.STOPPED:
        return Verdict(Outcome.NO_RESULT, "said what is no answer")
    if run.status in (-9, -24):  # SIGXCPU, or the kernel's hand
        return Verdict(Outcome.LIMIT, f"killed by signal {-run.status}")
    return Verdict(Outcome.NO_RESULT, f"ended with status {run.status} and without an answer")


def _summary(results: list[Verdict], partial_credit: bool) -> Verdict:
    passed = sum(result.outcome is Outcome.CORRECT for result in results)
    if passed == len(results):
        return Verdict(Outcome.CORRECT)
    first = next(result for result in results if result.outcome is not Outcome.CORRECT)
    if first.outcome is Outcome.ERROR:  # the sandbox was lost under it twice: that is the program's doing
        first = Verdict(Outcome.NO_RESULT, first.detail)
    detail = f"{passed} of {len(results)} tests passed; the first that did not: {first.detail}"
    return Verdict(first.outcome, detail, passed / len(results) if partial_credit else None)


def _room_for(size: int, limits: Limits) -> Limits:
    """Limits whose output leaves room for the answers that are expected, and says little of how long they are."""
    return Limits(limits.seconds, limits.memory_mb, max(limits.max_output, 1 << (4 * size + 1).bit_length()))


def _line(message: dict[str, Any]) -> bytes:
    return values.encode(message).encode() + b"\n"


def _brief(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integer of over 4300 digits
        text = f"a large {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


# --- the workers -----------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_open: dict[Callable[[], Sandbox], Sandbox] = {}
_settings: dict[str, Any] = {"workers": os.cpu_count() or 1, "allow_unsafe": False}


def start(workers: int | None = None, *, allow_unsafe: bool = False) -> None:
    """Start the workers, if they are not running. A trainer does it early, before CUDA and its threads.

    Raises:
        SandboxUnavailable: see ``rewards.sandbox.Sandbox``.
    """
    with _lock:
        if not _open:
            _settings.update(workers=workers or os.cpu_count() or 1, allow_unsafe=allow_unsafe)
    _sandbox()


def stop() -> None:
    """End the workers. The next call of ``start`` or of a reward starts them again."""
    with _lock:
        for sandbox in _open.values():
            sandbox.close()
        _open.clear()


def _sandbox() -> Sandbox:
    """Where programs run."""
    return _opened(_sandbox, _settings["workers"])


def _judges() -> Sandbox:
    """Where the tests of data sets run, apart, so that a program that waits for its judge never waits for a place."""
    return _opened(_judges, 1)


def _opened(which: Callable[[], Sandbox], workers: int) -> Sandbox:
    with _lock:
        if which not in _open:
            _open[which] = probed_sandbox(workers, allow_unsafe=_settings["allow_unsafe"])
        return _open[which]
