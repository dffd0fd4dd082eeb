"""GSM8K: the answer block holds one number, equal to the one after ``####`` in the row's ``answer`` column.

A number may be written as people write it (``72``, ``$1,234.50``, ``-3 degrees``, ``72.0``), never as a sum, a fraction
or two candidates. The whole block is read, in exact decimals, so nothing can hide beside the number.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rewards.tags import NoAnswer, single_answer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "answer"

MAX_LENGTH = 100
# A currency sign may stand before, a percent sign or a unit of up to two words after. Thousands are in groups of three
# or not grouped. A word that would change the number ("2 dozen") is no unit.
NUMBER = re.compile(
    r"(?P<sign>[+-]?)\$?[ ]?(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?)[ ]?%?"
    r"(?:[ ](?!(?:dozen|hundred|thousand|million|billion)s?\b)[a-z]+){0,2}\.?",
    re.IGNORECASE | re.ASCII,
)
GOLD_MARK = "####"


def verify(gold: Any, completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``gold`` is the row's worked solution, which ends in ``#### 72``. ``status`` is how the completion ended: one cut
    off at ``"length"`` is worth 0 whatever it says, one that ended in ``"error"`` has no reward. Never raises on any
    text.
    """
    expected = _number(gold.rpartition(GOLD_MARK)[2]) if isinstance(gold, str) and GOLD_MARK in gold else None
    if expected is None:
        broken = f"answer must end in {GOLD_MARK} and a number (bare ones are for reward math), got {str(gold)[-40:]!r}"
        return Verdict(Outcome.GOLD_UNPARSEABLE, broken)
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        answer = single_answer(prefill + completion)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))
    value = _number(answer)
    if value is None:
        return Verdict(Outcome.UNPARSEABLE, f"expected one number, got {answer[:MAX_LENGTH]!r}")
    if value != expected:
        return Verdict(Outcome.WRONG, f"is {value}, not {expected}")
    return Verdict(Outcome.CORRECT)


def gsm8k_reward(
    prompts: list[Any],
    completions: list[Any],
    answer: list[str],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the number is right, 0 where it is not, None where the row's own ``answer`` holds none.

    TRL's signature: every argument is a list with one entry a completion.
    """
    verdicts = [
        verify(answer_i, text_of(completion), prefill=prefill_i, status=status_i)
        for answer_i, completion, prefill_i, status_i in zip(
            answer,
            completions,
            prefill or [""] * len(completions),
            status or ["stop"] * len(completions),
            strict=True,
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for this row, or None."""
    verdict = verify(row.get("answer"), "")
    return verdict.detail if verdict.outcome is Outcome.GOLD_UNPARSEABLE else None


def _number(text: str) -> Decimal | None:
    """The one number that ``text`` is, or None."""
    text = text.strip()
    match = NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    return Decimal(match["sign"] + match["number"].replace(",", "")) if match else None
