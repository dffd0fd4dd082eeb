r"""Math: one answer (a number, formula, set, interval, ...) equal to the row's ``answer`` column.

The answer is extracted (``extract.py``), made canonical, and compared exactly: nearly every pair by rational arithmetic
in this process, the rest by math-verify's parser and sympy in a worker that is killed when it is late. No tolerance
anywhere: 0.333 is not 1/3. Model text never meets ``eval``.

``answer`` is the bare answer, a GSM8K solution that ends in ``#### 72``, or a MATH solution with a ``\boxed{}``.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rewards.math import pool, units
from rewards.math.compare import same_form, same_value, unknown_values
from rewards.math.exact import NotExact
from rewards.math.extract import find_gold, find_piece
from rewards.math.forms import read, read_gold
from rewards.math.language import is_prose, is_written_only
from rewards.math.names import named
from rewards.math.numbers import plain_number as plain_number_of
from rewards.math.pool import WorkerDied, WorkerTimeout, start, stop
from rewards.math.shapes import Form
from rewards.math.text import as_written, canonical
from rewards.math.text_errors import Unreadable
from rewards.tags import NoAnswer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

__all__ = ["check_row", "gold_fault", "math_reward", "start", "stop", "verify"]

GOLD_TIMEOUT = 10.0  # seconds; a gold answer is looked at once, and losing one to a busy machine loses a row
MAX_CACHED = 4096


def verify(
    answer: Any,
    completion: str,
    *,
    prefill: str = "",
    status: str = "stop",
    plain_number: bool = False,
    evaluated: bool = False,
    timeout: float = 3.0,
) -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``status`` is how the completion ended: one cut off at ``"length"`` is worth 0 whatever it says, one that ended in
    ``"error"`` has no reward. ``plain_number`` accepts a number that ends the last line where there is no block, box or
    ``####``. ``evaluated`` is for golds that are numbers: it refuses an answer that has still to be worked out
    (``19 + 24``, which the question may have said itself). ``timeout`` is in seconds, for pairs that go to a worker.
    Never raises on any text.

    Raises:
        rewards.math.pool.WorkerFailed: workers cannot be started here.
    """
    judged = _judge(answer, prefill + completion, status, plain_number, evaluated)
    return judged if isinstance(judged, Verdict) else judged(timeout)


def math_reward(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    plain_number: bool = False,
    evaluated: bool = False,
    timeout: float = 3.0,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the answer is right, 0 where it is not, None where the row's own ``answer`` cannot be read.

    TRL's signature: lists with one entry a completion. See ``verify`` for the other arguments.
    """
    judged = [
        _judge(answer_i, prefill_i + text_of(completion), status_i, plain_number, evaluated)
        for answer_i, completion, prefill_i, status_i in zip(
            answer,
            completions,
            prefill or [""] * len(completions),
            status or ["stop"] * len(completions),
            strict=True,
        )
    ]
    slow = [i for i, verdict in enumerate(judged) if not isinstance(verdict, Verdict)]
    if slow:
        with ThreadPoolExecutor(min(len(slow), pool.current().workers)) as threads:
            for i, verdict in zip(slow, threads.map(lambda i: judged[i](timeout), slow), strict=True):  # type: ignore[operator]
                judged[i] = verdict
    return rewards_of([verdict for verdict in judged if isinstance(verdict, Verdict)], kwargs.get("log_verdict"))


def gold_fault(gold: Any) -> str | None:
    """Why a row's ``answer`` cannot be judged, so that no completion is ever paid for it; None if it can be.

    One line for people. It may ask a worker, which is started where none runs.

    Raises:
        rewards.math.pool.WorkerFailed: workers cannot be started here.
    """
    return _gold(gold).broken or None


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for this row, or None."""
    return gold_fault(row.get("answer"))


def same_answer(gold: str, answer: str, timeout: float) -> bool:
    """Whether two bare answers are equal, as a row's and a completion's are."""
    known = _gold(gold)
    if known.form is None:
        return False
    try:
        return _compared(known.form, read(answer)).outcome is Outcome.CORRECT
    except NotExact:
        return _ask_worker(known.piece, answer, timeout).outcome is Outcome.CORRECT
    except Unreadable:
        return False


# --- one pair --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gold:
    """``piece`` as the row has it, its canonical text and form; or why it is ``broken``."""

    piece: str = ""
    text: str = ""
    form: Form | None = None
    broken: str = ""


def _judge(
    answer: Any, text: str, status: str, plain_number: bool, evaluated: bool
) -> Verdict | Callable[[float], Verdict]:
    """The verdict. If a worker must decide, a function from the timeout in seconds to the verdict instead."""
    gold = _gold(answer)
    if gold.form is None:
        return Verdict(Outcome.GOLD_UNPARSEABLE, f"answer {str(answer)[-40:]!r}: {gold.broken}")
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        piece = find_piece(text, plain_number=plain_number)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))
    try:
        if as_written(canonical(piece)) == as_written(gold.text):
            return Verdict(Outcome.CORRECT)
        answered = read(piece)
        if evaluated and _is_number(gold.form) and not _is_number(answered):
            return Verdict(Outcome.WRONG, "has still to be worked out")
        return _compared(gold.form, answered)
    except NotExact:
        return lambda timeout: _ask_worker(gold.piece, piece, timeout)
    except Unreadable as why:
        return Verdict(Outcome.UNPARSEABLE, f"{piece[:60]!r}: {why}")


def _compared(gold: Form, answer: Form) -> Verdict:
    if same_form(gold, answer, same_value):
        return Verdict(Outcome.CORRECT)
    return Verdict(Outcome.WRONG, "is not the row's answer")


def _is_number(form: Form) -> bool:
    """Whether a form is a plain number, perhaps with a name or a unit. ``10/2`` is not: it has to be worked out."""
    if form.kind == "choice":
        form = form.items[0]
    if rest := named(form):
        form = rest[1]
    value = units.split(form.text).value if form.kind == "value" else ""
    number = plain_number_of(value)
    return number is not None and (number.denominator > 1 or not ("/" in value or "frac" in value))


@lru_cache(maxsize=MAX_CACHED)
def _gold_of(answer: str) -> _Gold:
    """A row's gold answer. Cached, so that a run never judges the same gold in two ways."""
    try:
        piece = find_gold(answer)
        text = canonical(piece)
    except (NoAnswer, Unreadable) as why:
        return _Gold(broken=str(why))
    if is_prose(text):
        return _Gold(piece, broken="prose, which nobody writes the same again")
    try:
        form = read_gold(piece)
        unknown = unknown_values(form)
    except Unreadable as why:
        if is_written_only(piece):
            return _Gold(piece, text, Form("words", text))
        return _Gold(piece, broken=str(why))
    if unknown:
        try:
            reply = pool.current().ask({"gold": piece}, GOLD_TIMEOUT)
        except (WorkerTimeout, WorkerDied) as why:
            return _Gold(piece, broken=str(why))
        if reply.get("right") is not True:
            return _Gold(piece, broken=str(reply.get("unreadable")))
    return _Gold(piece, text, form)


def _gold(answer: Any) -> _Gold:
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        return _Gold(broken=f"expected text or a number, got {type(answer).__name__}")
    return _gold_of(answer)


# --- what goes to a worker -------------------------------------------------------------------------------------------

_known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
_known_lock = threading.Lock()


def _ask_worker(gold: str, piece: str, timeout: float) -> Verdict:
    """The worker's verdict, cached for equal answers. A timeout is not cached: the machine may have been busy."""
    key = (gold, piece)
    with _known_lock:
        if key in _known:
            _known.move_to_end(key)
            return _known[key]
    try:
        reply = pool.current().ask({"gold": gold, "answer": piece}, timeout)
    except WorkerTimeout as why:
        return Verdict(Outcome.TIMEOUT, f"{piece[:60]!r}: {why}")
    except WorkerDied as why:
        return Verdict(Outcome.UNPARSEABLE, f"{piece[:60]!r}: the worker {why}, twice")
    if "unreadable" in reply:
        verdict = Verdict(Outcome.UNPARSEABLE, f"{piece[:60]!r}: {reply['unreadable']}")
    elif reply["right"] is True:
        verdict = Verdict(Outcome.CORRECT)
    else:
        verdict = Verdict(Outcome.WRONG, "is not the row's answer")
    with _known_lock:
        _known[key] = verdict
        if len(_known) > MAX_CACHED:
            _known.popitem(last=False)
    return verdict
