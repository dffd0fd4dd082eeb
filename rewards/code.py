"""Code: model-written Python against tests. It runs in the sandbox and is judged outside of it.

The program is the last fenced Python block after the thinking. ``rewards/sandbox`` runs it, and its answers are
compared here, with their exact types. The program never sees the expected answers. How it exits does not count, only
that every test has its answer.
"""

from __future__ import annotations

import os
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rewards.code_tests import BrokenTests, Calls, Check, Script, Tests, parse_tests
from rewards.sandbox import Ended, Limits, Run, Sandbox, probed_sandbox
from rewards.sandbox.program import EXIT_STATUS, LOADED, MAX_MESSAGE, PASSED, Request, call_line, value_line
from rewards.tags import NoAnswer, after_thinking, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "answer"

MAX_PROGRAM = 1 << 16  # characters
PYTHON = frozenset({"", "python", "python3", "py"})
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
    task = _read(tests, prefill + completion, status)
    return task if isinstance(task, Verdict) else _judge(*task, partial_credit, limits or Limits())


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
    start(allow_unsafe=allow_unsafe)
    tasks = [
        _read(tests_i, prefill_i + text_of(completion), status_i)
        for tests_i, completion, prefill_i, status_i in zip(
            tests, completions, prefill or [""] * n, status or ["stop"] * n, strict=True
        )
    ]
    programs = {_key(task): task for task in tasks if not isinstance(task, Verdict)}  # equal programs run once
    judge = partial(_judge, partial_credit=partial_credit, limits=Limits(timeout, memory_mb))
    with ThreadPoolExecutor(max(1, min(len(programs), _settings["workers"]))) as threads:
        judged = dict(zip(programs, threads.map(lambda task: judge(*task), programs.values()), strict=True))
    verdicts = [task if isinstance(task, Verdict) else judged[_key(task)] for task in tasks]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def _key(task: tuple[Tests, str]) -> tuple[int, str]:
    return id(task[0]), task[1]


def _read(tests: Any, text: str, status: str) -> Verdict | tuple[Tests, str]:
    """Tests and program of a completion, or the verdict where there is nothing to run."""
    try:
        parsed = parse_tests(tests)
    except BrokenTests as why:
        return Verdict(Outcome.GOLD_UNPARSEABLE, str(why))
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        return parsed, extract_program(text)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))


def _judge(tests: Tests, program: str, partial_credit: bool, limits: Limits) -> Verdict:
    results = run_tests(tests, program, limits, every=partial_credit)
    if any(result.outcome is Outcome.ERROR for result in results):  # the sandbox died: once may be chance
        results = run_tests(tests, program, limits, every=partial_credit)
    return _summary(results, partial_credit)


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for this row, or None."""
    try:
        parse_tests(row.get("tests"))
    except BrokenTests as why:
        return str(why)
    return None


# --- the program -----------------------------------------------------------------------------------------------------


def extract_program(text: str) -> str:
    """The last fenced Python block after the thinking, dedented.

    A fence is a line that begins with three backticks. After them, an opening fence says ``python``, ``py`` or nothing,
    and a closing one says nothing. Raises NoAnswer if no block is closed, or if the program is empty or longer than
    MAX_PROGRAM.
    """
    block: list[str] | None = None  # lines of the block that is open
    program: list[str] | None = None
    for line in after_thinking(text).split("\n"):
        fence = line.strip()
        if block is None:
            if fence.startswith("```") and "`" not in fence[3:]:
                language = (fence[3:].split() or [""])[0].lower()
                block, is_python = [], language in PYTHON
        elif fence == "```":
            program, block = (block if is_python else program), None
        else:
            block.append(line)
    if block is not None:
        raise NoAnswer("the last code block is not closed")
    if program is None:
        raise NoAnswer("no fenced Python block after the thinking")
    source = "\n".join(program)
    if len(source) > MAX_PROGRAM:
        raise NoAnswer(f"a program of {len(source)} characters, more than {MAX_PROGRAM}")
    if not source.strip():
        raise NoAnswer("the program is empty")
    return textwrap.dedent(source.strip("\n")).rstrip() + "\n"


# --- tests -----------------------------------------------------------------------------------------------------------


def run_tests(tests: Tests, program: str, limits: Limits, every: bool = False) -> list[Verdict]:
    """Verdicts of the tests in order. Without ``every``, none need run after the first that is not correct."""
    if isinstance(tests, Calls):
        return _run_calls(tests, program, limits)
    if isinstance(tests, Script):
        return _run_scripts(tests, program, limits, every)
    return [_run_check(tests, program, limits)]


def _run_calls(tests: Calls, program: str, limits: Limits) -> list[Verdict]:
    expected = [value_line(output) for output in tests.outputs]
    answers: list[bytes] = []
    with _sandbox().run(Request("calls", program), _room_for(sum(map(len, expected)), limits)) as run:
        for arguments in tests.inputs:
            run.send(call_line(tests.fn_name, *arguments).encode() + b"\n")
        run.finish_sending()
        loaded = run.line()
        if loaded == LOADED.encode():
            while len(answers) < len(expected) and (answer := run.line()) is not None:
                answers.append(answer)
        surplus = len(answers) == len(expected) and bool(run.rest())
    if loaded is not None and loaded != LOADED.encode():
        return [_failed(loaded)] * len(expected)
    if surplus:  # forged, and nobody knows which lines
        return [Verdict(Outcome.NO_RESULT, "more answers than calls")] * len(expected)
    results = [_compared(answer, line) for answer, line in zip(answers, expected, strict=False)]
    return results + [_ending(run)] * (len(expected) - len(results))


def _compared(answer: bytes, expected: str) -> Verdict:
    """Compare an answer with the expected line, as bytes. It is never parsed, since it may be anything."""
    if answer == expected.encode():
        return Verdict(Outcome.CORRECT)
    if answer.startswith(b"value "):
        return Verdict(Outcome.WRONG, f"returned {_brief(answer[6:])}, not {_brief(expected[6:])}")
    return _failed(answer)


def _run_scripts(tests: Script, program: str, limits: Limits, every: bool) -> list[Verdict]:
    """One run per input. All of them get four times the seconds of one, and none follows a run that timed out."""
    results: list[Verdict] = []
    end = time.monotonic() + 4 * limits.seconds
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        result = _run_script(program, given, expected, limits)
        results.append(result)
        if result.outcome is Outcome.TIMEOUT or time.monotonic() > end:
            break
        if result.outcome is not Outcome.CORRECT and not every:
            break
    return results + [Verdict(Outcome.TIMEOUT, "no time was left")] * (len(tests.inputs) - len(results))


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
            return Verdict(Outcome.WRONG, f"wrote {_brief(output)}, not {_brief(expected)}")
    return _ending(run)


def _lines(text: str) -> list[str]:
    """Output for comparison: without blanks at line ends and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _run_check(tests: Check, program: str, limits: Limits) -> Verdict:
    """Run the data set's test and the program as two sandboxed runs: the test's calls go to the program.

    Lines are passed on unchanged. Both places are taken before either clock starts, and judges have as many places as
    programs, so no run waits while its clock ticks.
    """
    limits = _room_for(1 << 18, limits)
    failure = None  # of the program's last call; its test may have expected it
    with (
        _sandbox().place() as place,
        _judges().place() as judges_place,
        place.run(Request("calls", program), limits) as run,
        judges_place.run(Request("judge", tests.source, tests.fn_name), limits) as judge,
    ):
        loaded = run.line()
        if loaded is not None and loaded != LOADED.encode():
            return _failed(loaded)
        while loaded is not None and (message := judge.line()) is not None:
            if message == PASSED.encode():
                return Verdict(Outcome.CORRECT)
            if not message.startswith(b"call "):
                return failure or Verdict(Outcome.WRONG, _failed(message).detail)
            run.send(message + b"\n")
            answer = run.line()
            if answer is None:
                break
            failure = _failed(answer) if answer.startswith(b"failed ") else None
            judge.send(answer + b"\n")
    return _ending(judge if run.ended is Ended.STOPPED else run)


def _failed(line: bytes) -> Verdict:
    """The verdict on a failure that a program reports; NO_RESULT if its line makes no sense."""
    what, _, rest = line[: 8 * MAX_MESSAGE].decode("ascii", "replace").partition(" ")
    kind, _, message = rest.partition(" ")
    if what != "failed":
        return Verdict(Outcome.NO_RESULT, "said what is no answer")
    return Verdict(FAILURES.get(kind, Outcome.WRONG), _brief(message.strip('"')))


def _ending(run: Run) -> Verdict:
    """Why a run gave no (further) answer."""
    if run.ended is Ended.TIMEOUT:
        return Verdict(Outcome.TIMEOUT)
    if run.ended is Ended.OUTPUT:
        return Verdict(Outcome.LIMIT, "too much output")
    if run.ended is Ended.LOST:
        return Verdict(Outcome.ERROR, "the sandbox lost the run")
    if run.status in (-9, -24):  # SIGKILL from the kernel, or SIGXCPU
        return Verdict(Outcome.LIMIT, f"killed by signal {-run.status}")
    return Verdict(Outcome.NO_RESULT, f"ended with status {run.status} and without an answer")


def _summary(results: list[Verdict], partial_credit: bool) -> Verdict:
    passed = sum(result.outcome is Outcome.CORRECT for result in results)
    if passed == len(results):
        return Verdict(Outcome.CORRECT)
    first = next(result for result in results if result.outcome is not Outcome.CORRECT)
    if first.outcome is Outcome.ERROR:  # the sandbox died twice: the program's doing
        first = Verdict(Outcome.NO_RESULT, first.detail)
    detail = f"{passed} of {len(results)} tests passed; the first that did not: {first.detail}"
    return Verdict(first.outcome, detail, passed / len(results) if partial_credit else None)


def _room_for(size: int, limits: Limits) -> Limits:
    """Limits with room for the expected answers. Rounding up to a power of 2 hides how long those are."""
    return Limits(limits.seconds, limits.memory_mb, max(limits.max_output, 1 << (4 * size + 1).bit_length()))


def _brief(value: str | bytes) -> str:
    text = value[:101].decode("ascii", "backslashreplace") if isinstance(value, bytes) else value
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
    """Where the tests of data sets run. It has places of its own, so that no program waits for its judge's place."""
    return _opened(_judges, _settings["workers"])


def _opened(which: Callable[[], Sandbox], workers: int) -> Sandbox:
    with _lock:
        if which not in _open:
            _open[which] = probed_sandbox(workers, allow_unsafe=_settings["allow_unsafe"])
        return _open[which]
