"""Writing a program with its tests at hand: public ones may be run and say what failed, hidden ones pay at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rewards.code import judge_program, results_of, start
from rewards.code_tests import BrokenTests, Check, parse_tests
from rewards.code_tests import Tests as RowTests
from rewards.code_workers import prepare
from rewards.sandbox import Limits
from rewards.verdict import Outcome, Verdict

SHOWN = 3  # failed tests that an answer spells out


class WithTests:
    """One tool, ``run_tests``, for rows with a column ``tests`` as the reward ``code`` reads it.

    The first ``public`` tests of a row may be run (one is always left hidden), and the answer says of the failed ones
    what was put in, what was expected and what came. Of the others nothing is told.

    **Reward.** The last program that the model gave to the tool is its answer: 1 where it passes all tests of the row,
    public and hidden, else 0; with ``partial_credit`` the share of the hidden tests. 0 where it never called the tool.
    None where the row's tests are broken. What the model writes beside its calls does not count.

    The other arguments are those of the reward ``code``; ``max_shown`` is in characters, for one value.
    """

    def __init__(
        self,
        *,
        public: int = 2,
        max_shown: int = 200,
        timeout: float = 4.0,
        memory_mb: int = 512,
        comparison: str = "exact",
        tolerance: float | None = None,
        packages: Sequence[str] = (),
        partial_credit: bool = False,
        allow_unsafe: bool = False,
    ) -> None:
        if public < 0:
            raise ValueError(f"public: the first so many tests are public, it can't be {public}")
        self.public, self.max_shown = public, max_shown
        self.how: dict[str, Any] = {
            "limits": Limits(timeout, memory_mb),
            "comparison": comparison,
            "tolerance": tolerance,
            "packages": tuple(packages),
        }
        self.partial_credit, self.allow_unsafe = partial_credit, allow_unsafe

    @classmethod
    def prepare(cls, *, packages: Sequence[str] = (), allow_unsafe: bool = False, **_: Any) -> None:
        """Try the sandbox, once for all episodes."""
        prepare(allow_unsafe=allow_unsafe, packages=tuple(packages))

    def reset(self, tests: Any = None, **row: Any) -> None:
        try:
            self.tests = parse_tests(tests)
        except BrokenTests as why:
            raise ValueError(f"the row's column tests: {why}") from None
        self.program: str | None = None
        start(1, allow_unsafe=self.allow_unsafe, packages=self.how["packages"])

    def run_tests(self, code: str) -> str:
        """Run your program against the public tests. The last program that you run here is your answer.

        Args:
            code: The whole program.

        Returns:
            Which tests failed, and how.
        """
        self.program = code
        shown = first_tests(self.tests, self.public)
        if shown is None:
            return "There are no public tests for this task. The program is kept as your answer."
        results = results_of(shown, code, **self.how)
        failed = [(place, result) for place, result in enumerate(results) if result.outcome is not Outcome.CORRECT]
        if not failed:
            return f"All {len(results)} public tests passed."
        lines = [f"{len(failed)} of {len(results)} public tests failed."]
        lines += [self._told(shown, place, result) for place, result in failed[:SHOWN]]
        return "\n".join(lines)

    def _told(self, tests: RowTests, place: int, result: Verdict) -> str:
        assert not isinstance(tests, Check)
        given, expected = tests.inputs[place], tests.outputs[place]
        call = f"{tests.fn_name}({', '.join(map(repr, given))})" if tests.fn_name else f"input {given!r}"
        said = result.detail or result.outcome.value
        if result.outcome is not Outcome.WRONG:
            said = f"{result.outcome.value}: {result.detail}" if result.detail else result.outcome.value
        return f"{self._cut(call)}: expected {self._cut(repr(expected))}; {self._cut(said)}"

    def _cut(self, text: str) -> str:
        return text if len(text) <= self.max_shown else f"{text[: self.max_shown]}…"

    def get_reward(self) -> float | None:
        if self.program is None:
            return 0.0
        # What the public ones expect was told, so they are worth nothing by themselves.
        judged = hidden_tests(self.tests, self.public) if self.partial_credit else self.tests
        return judge_program(judged, self.program, partial_credit=self.partial_credit, **self.how).reward


def first_tests(tests: RowTests, number: int) -> RowTests | None:
    """The first so many tests, of which one always stays out; None where nothing is left, or they can't be parted
    (HumanEval's are one program)."""
    if isinstance(tests, Check):
        return None
    kept = min(number, len(tests.inputs) - 1)
    shown: dict[str, Any] = {"inputs": tests.inputs[:kept], "outputs": tests.outputs[:kept]}
    return replace(tests, **shown) if kept > 0 else None


def hidden_tests(tests: RowTests, number: int) -> RowTests:
    """Those that ``first_tests`` leaves."""
    shown = first_tests(tests, number)
    if isinstance(tests, Check) or shown is None:
        return tests
    assert not isinstance(shown, Check)
    left: dict[str, Any] = {"inputs": tests.inputs[len(shown.inputs) :], "outputs": tests.outputs[len(shown.inputs) :]}
    return replace(tests, **left)


def play(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of one who has the row's ``solution`` (a program, or a list of them), for the audit."""
    found = row.get("solution") or row.get("canonical_solution") or row.get("solutions") or []
    programs = [found] if isinstance(found, str) else list(found)
    return [{"name": "run_tests", "arguments": {"code": str(program)}} for program in programs[:1]]
