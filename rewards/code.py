"""Code: model-written Python against tests. It runs in the sandbox and is judged outside of it.

The program is a fenced Python block after the thinking (``code_text.py``). ``rewards/sandbox`` runs it against the
row's tests (``code_tests.py``, ``code_runs.py``), and its answers are compared outside (``code_compare.py``). The
program never sees the expected answers. How it exits does not count, only that every test has its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from rewards import code_workers
from rewards.code_compare import NAMES, Comparison, UnknownComparison
from rewards.code_runs import Terms, run_tests
from rewards.code_tests import BrokenTests, Tests, parse_tests
from rewards.code_text import continued_program, extract_program
from rewards.code_workers import opened as _open
from rewards.code_workers import programs_of as _sandbox
from rewards.code_workers import stop
from rewards.sandbox import Limits
from rewards.sandbox.packages import names_of
from rewards.tags import NoAnswer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

__all__ = [
    "_open",
    "_sandbox",
    "check_row",
    "code_reward",
    "extract_program",
    "judge_program",
    "results_of",
    "start",
    "stop",
    "verify",
]

JUDGES = "answer"


def verify(
    tests: Any,
    completion: str,
    *,
    prefill: str = "",
    status: str = "stop",
    partial_credit: bool = False,
    limits: Limits | None = None,
    comparison: str = "exact",
    tolerance: float | None = None,
    packages: Sequence[str] = (),
    continues: Sequence[str] | None = None,
) -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``tests``: see ``rewards/code_tests.py``. With ``partial_credit`` the score is the share of tests passed, else all
    or nothing. ``limits.seconds`` is for all calls of a function together, or for each standard input. The rest is as
    in ``code_reward``.

    Raises:
        SandboxUnavailable: there is no way here to run the program safely.
        PackageRefused: one of ``packages`` is not here, or cannot be imported in the sandbox.
        UnknownComparison: there is none of that name.
    """
    terms = Terms(limits or Limits(), _comparison(comparison, tolerance), names_of(packages), partial_credit)
    task = _read(tests, prefill, completion, status, continues)
    return task if isinstance(task, Verdict) else _judge(*task, terms)


def judge_program(
    tests: Tests,
    program: str,
    *,
    partial_credit: bool = False,
    limits: Limits | None = None,
    comparison: str = "exact",
    tolerance: float | None = None,
    packages: Sequence[str] = (),
) -> Verdict:
    """Judge a program that need not be looked for in a text. Arguments and errors are those of ``verify``."""
    terms = Terms(limits or Limits(), _comparison(comparison, tolerance), names_of(packages), partial_credit)
    return _judge(tests, program, terms)


def results_of(
    tests: Tests,
    program: str,
    *,
    limits: Limits | None = None,
    comparison: str = "exact",
    tolerance: float | None = None,
    packages: Sequence[str] = (),
) -> list[Verdict]:
    """A verdict for each of a row's tests, also of those behind one that failed. As ``judge_program``."""
    return run_tests(
        tests, program, Terms(limits or Limits(), _comparison(comparison, tolerance), names_of(packages), True)
    )


def code_reward(
    prompts: list[Any],
    completions: list[Any],
    tests: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    *,
    partial_credit: bool = False,
    comparison: str = "exact",
    tolerance: float | None = None,
    packages: Sequence[str] = (),
    timeout: float = 6.0,
    memory_mb: int = 1024,
    allow_unsafe: bool = False,
    continues: Sequence[str] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the program passes every test, 0 where not, None where the row's own ``tests`` are broken.

    TRL's signature: lists with one entry a completion. ``partial_credit`` pays the share of tests passed.
    ``comparison`` is ``exact``, ``livecodebench``, or the path of a checker (``my_checker.py``); ``tolerance`` is what
    decimals may differ by, ``packages`` what programs may import. ``timeout`` is in seconds, ``memory_mb`` a program's
    address space, ``allow_unsafe`` runs even where nothing isolates. With ``continues`` an answer has no block: it goes
    on with the program that the prefill begins, up to the first of these strings (HumanEval's way for models without a
    chat template). Raises what ``verify`` raises.
    """
    n = len(completions)
    start(allow_unsafe=allow_unsafe, packages=packages)
    how = _comparison(comparison, tolerance)
    terms = Terms(Limits(timeout, memory_mb), how, names_of(packages), partial_credit)
    tasks = [
        _read(tests_i, prefill_i, text_of(completion), status_i, continues)
        for tests_i, completion, prefill_i, status_i in zip(
            tests, completions, prefill or [""] * n, status or ["stop"] * n, strict=True
        )
    ]
    programs = {_key(task): task for task in tasks if not isinstance(task, Verdict)}  # equal programs run once

    def judge(task: tuple[Tests, str]) -> Verdict:
        return _judge(*task, terms)

    with ThreadPoolExecutor(max(1, min(len(programs), code_workers.settings["workers"]))) as threads:
        judged = dict(zip(programs, threads.map(judge, programs.values()), strict=True))
    verdicts = [task if isinstance(task, Verdict) else judged[_key(task)] for task in tasks]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for this row, or None."""
    try:
        parse_tests(row.get("tests"))
    except BrokenTests as why:
        return str(why)
    return None


def start(
    workers: int | None = None,
    *,
    allow_unsafe: bool = False,
    packages: Sequence[str] = (),
    comparison: str = "exact",
    tolerance: float | None = None,
) -> None:
    """Start the workers, if they are not running. A trainer does it early, before CUDA and its threads.

    Raises what ``verify`` raises, before any program is run.
    """
    _comparison(comparison, tolerance)
    code_workers.start(workers, allow_unsafe=allow_unsafe, packages=names_of(packages))


# --- one completion --------------------------------------------------------------------------------------------------


def _key(task: tuple[Tests, str]) -> tuple[int, str]:
    return id(task[0]), task[1]


def _read(
    tests: Any, prefill: str, text: str, status: str, continues: Sequence[str] | None = None
) -> Verdict | tuple[Tests, str]:
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
        if continues is not None:
            return parsed, continued_program(prefill, text, continues)
        return parsed, extract_program(prefill + text, parsed.fn_name)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))


def _judge(tests: Tests, program: str, terms: Terms) -> Verdict:
    results = run_tests(tests, program, terms)
    if any(result.outcome is Outcome.ERROR for result in results):  # the sandbox died: once may be chance
        results = run_tests(tests, program, terms)
    return _summary(results, terms.every)


def _summary(results: list[Verdict], partial_credit: bool) -> Verdict:
    passed = sum(result.outcome is Outcome.CORRECT for result in results)
    if passed == len(results):
        return Verdict(Outcome.CORRECT)
    first = next(result for result in results if result.outcome is not Outcome.CORRECT)
    if first.outcome is Outcome.GOLD_UNPARSEABLE:
        return first
    if first.outcome is Outcome.ERROR:  # the sandbox died twice: the program's doing
        first = Verdict(Outcome.NO_RESULT, first.detail)
    detail = f"{passed} of {len(results)} tests passed; the first that did not: {first.detail}"
    return Verdict(first.outcome, detail, passed / len(results) if partial_credit else None)


@lru_cache(maxsize=64)
def _comparison(comparison: str, tolerance: float | None) -> Comparison:
    """The comparison of a name, or of the checker in a file. Raises UnknownComparison."""
    if comparison in NAMES or not str(comparison).endswith(".py"):
        return Comparison(comparison, tolerance)
    try:
        return Comparison(tolerance=tolerance, checker=Path(comparison).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as why:
        raise UnknownComparison(f"comparison: {comparison} cannot be read: {why}") from None
