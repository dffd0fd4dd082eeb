"""Programs run against tests: in the sandbox, with what comes out compared here or by a checker, and verdicts on it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from rewards.code_compare import Comparison
from rewards.code_tests import Calls, Check, Script, Tests
from rewards.code_workers import judges_of, programs_of
from rewards.sandbox import Ended, Limits, Run
from rewards.sandbox.program import (
    ACCEPTED,
    EXIT_STATUS,
    IN_ORDER,
    LOADED,
    MAX_MESSAGE,
    PASSED,
    REFUSED,
    Request,
    call_line,
    check_line,
    value_line,
)
from rewards.verdict import Outcome, Verdict

FAILURES = {
    "limit": Outcome.LIMIT,
    "denied": Outcome.DENIED,
    "exit": Outcome.NO_RESULT,
    "syntax": Outcome.UNPARSEABLE,
}


@dataclass(frozen=True)
class Terms:
    """How programs are run and judged: their limits, the packages that they may import, how outputs are compared where
    the row does not say, and whether all tests are run after one that is not correct (``every``)."""

    limits: Limits = field(default_factory=Limits)
    comparison: Comparison = field(default_factory=Comparison)
    packages: tuple[str, ...] = ()
    every: bool = False

    def with_room_for(self, size: int) -> Limits:
        """Limits with room for the expected answers. Rounding up to a power of 2 hides how long those are."""
        return replace(self.limits, max_output=max(self.limits.max_output, 1 << (4 * size + 1).bit_length()))


def run_tests(tests: Tests, program: str, terms: Terms) -> list[Verdict]:
    """Verdicts of the tests in order."""
    if isinstance(tests, Calls):
        return _run_calls(tests, program, terms)
    if isinstance(tests, Script):
        return _run_scripts(tests, program, terms)
    return [_run_check(tests, program, terms)]


def _run_calls(tests: Calls, program: str, terms: Terms) -> list[Verdict]:
    expected = [value_line(output) for output in tests.outputs]
    how = tests.comparison or terms.comparison
    answers: list[bytes] = []
    limits = terms.with_room_for(sum(map(len, expected)))
    with programs_of(terms.packages).run(Request("calls", program), limits) as run:
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
    if how.checker:
        results = _checked_calls(how.checker, tests, answers, terms)
    else:
        results = [_compared(how, answer, line) for answer, line in zip(answers, expected, strict=False)]
    return results + [_ending(run)] * (len(expected) - len(results))


def _compared(how: Comparison, answer: bytes, expected: str) -> Verdict:
    if not answer.startswith(b"value "):
        return _failed(answer)
    if how.same_value(answer[6:], expected[6:]):
        return Verdict(Outcome.CORRECT)
    return Verdict(Outcome.WRONG, f"returned {_brief(answer[6:])}, not {_brief(expected[6:])}")


def _checked_calls(checker: str, tests: Calls, answers: list[bytes], terms: Terms) -> list[Verdict]:
    """The checker's verdicts on what calls returned; those that failed are not shown to it."""
    returned = {place: answer[6:] for place, answer in enumerate(answers) if answer.startswith(b"value ")}
    asked = [
        check_line(tests.inputs[place], value.decode("ascii", "replace"), tests.outputs[place])
        for place, value in returned.items()
    ]
    verdicts = dict(zip(returned, _ask_checker(checker, "calls", asked, terms), strict=True))
    return [verdicts.get(place) or _failed(answer) for place, answer in enumerate(answers)]


def _ask_checker(checker: str, what: str, asked: list[str], terms: Terms) -> list[Verdict]:
    """The data set's own program decides, in the sandbox, since it reads what a hostile program has said."""
    with judges_of(terms.packages).run(Request("checker", checker, what), terms.limits) as run:
        for line in asked:
            run.send(line.encode() + b"\n")
        run.finish_sending()
        loaded = run.line()
        if loaded is not None and loaded != LOADED.encode():
            broken = Verdict(Outcome.GOLD_UNPARSEABLE, f"the checker does not run: {_failed(loaded).detail}")
            return [broken] * len(asked)
        said: list[bytes] = []
        while len(said) < len(asked) and (line_ := run.line()) is not None:
            said.append(line_)
    verdicts = [_said(line) for line in said]
    return verdicts + [Verdict(_ending(run).outcome, "the checker did not answer")] * (len(asked) - len(verdicts))


def _said(line: bytes) -> Verdict:
    if line == ACCEPTED.encode():
        return Verdict(Outcome.CORRECT)
    if line == REFUSED.encode():
        return Verdict(Outcome.WRONG, "the checker refuses it")
    return Verdict(Outcome.WRONG, f"the checker failed on it: {_failed(line).detail}")


def _run_scripts(tests: Script, program: str, terms: Terms) -> list[Verdict]:
    """One run per input. All of them get four times the seconds of one, and none follows a run that timed out."""
    results: list[Verdict] = []
    how = tests.comparison or terms.comparison
    end = time.monotonic() + 4 * terms.limits.seconds
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        result = _run_script(program, given, expected, how, terms)
        results.append(result)
        if result.outcome is Outcome.TIMEOUT or time.monotonic() > end:
            break
        if result.outcome is not Outcome.CORRECT and not terms.every:
            break
    return results + [Verdict(Outcome.TIMEOUT, "no time was left")] * (len(tests.inputs) - len(results))


def _run_script(program: str, given: str, expected: str, how: Comparison, terms: Terms) -> Verdict:
    limits = terms.with_room_for(len(expected))
    with programs_of(terms.packages).run(Request("script", program, given), limits) as run:
        output = run.rest()
    if run.ended is not Ended.EXITED:
        return _ending(run)
    text = output.decode("utf-8", "replace")
    if how.checker:
        verdict = _ask_checker(how.checker, "script", [check_line(given, text, expected)], terms)[0]
    elif how.same_text(text, expected):
        return Verdict(Outcome.CORRECT)
    else:
        verdict = Verdict(Outcome.WRONG, f"wrote {_brief(output)}, not {_brief(expected)}")
    if verdict.outcome in (Outcome.CORRECT, Outcome.GOLD_UNPARSEABLE):
        return verdict
    failure = next((kind for kind, code in EXIT_STATUS.items() if code == run.status and kind in FAILURES), "")
    if run.status and failure:
        return Verdict(FAILURES[failure], "as the program says by its exit status")
    return verdict if text.strip() else _ending(run)


def _run_check(tests: Check, program: str, terms: Terms) -> Verdict:
    """Run the data set's test and the program as two sandboxed runs: the test's calls go to the program.

    Lines are passed on unchanged. Both places are taken before either clock starts, and judges have as many places as
    programs, so no run waits while its clock ticks. A call that fails decides, unless the test has a handler for it:
    what swallows exceptions without one (``map`` and StopIteration) must not make a test shorter.
    """
    limits = terms.with_room_for(1 << 18)
    failure = None  # of the program's last call; its test may have expected it
    calls = 0
    with (
        programs_of(terms.packages).place() as place,
        judges_of(terms.packages).place() as judges_place,
        place.run(Request("calls", program, IN_ORDER), limits) as run,
        judges_place.run(Request("judge", tests.source, tests.fn_name), limits) as judge,
    ):
        loaded = run.line()
        if loaded is not None and loaded != LOADED.encode():
            return _failed(loaded)
        while loaded is not None and (message := judge.line()) is not None:
            if message == PASSED.encode():
                passed = Verdict(Outcome.CORRECT)
                return passed if calls else Verdict(Outcome.GOLD_UNPARSEABLE, f"test never calls {tests.fn_name}")
            if not message.startswith(b"call "):
                return failure or Verdict(Outcome.WRONG, _failed(message).detail)
            run.send(message + b"\n")
            answer = run.line()
            if answer is None:
                break
            calls += 1
            failure = None if answer.startswith(b"value ") else _failed(answer)
            if failure and not tests.catches:
                return failure
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


def _brief(value: str | bytes) -> str:
    text = value[:101].decode("ascii", "backslashreplace") if isinstance(value, bytes) else value
    return text if len(text) <= 100 else text[:97] + "..."
