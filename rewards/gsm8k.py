r"""GSM8K: the answer block holds one number, equal to the one after ``####`` in the row's ``answer`` column.

A number may be written as people write it (``72``, ``$1,234.50``, ``-3 degrees``, ``72.0``, ``.5``, ``\boxed{72}``),
never as a sum, a fraction or two candidates. The whole block is read, in exact decimals, so nothing can hide beside the
number. What may stand after it is a unit, a thing that is often counted, or a word of the row's own solution.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from rewards.math.words import FILLERS, NOUNS, TRAILING, UNITS, changes_a_number
from rewards.tags import NoAnswer, single_answer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "answer"

MAX_LENGTH = 100
# A currency sign may stand before, a percent sign or words after. Thousands are in groups of three or not grouped.
NUMBER = re.compile(
    r"(?P<sign>[+-]?)[$€£]?[ ]?(?P<minus>-?)(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?:[ ]?%|[ ]?[$€£])?(?P<words>(?:[ ][A-Za-z]+){0,4})\.?",
    re.ASCII,
)
MINUS = str.maketrans("\u2212\u2013\u2010\u2011", "----")
COUNTED_IN_TEXT = re.compile(r"[0-9] +(?:[a-z]+ +)??([a-z]+)")
BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")
DELIMITED = re.compile(r"\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_PLURALS = "boxes inches dishes bunches matches classes glasses buses pennies degree degrees m g"
COUNTED = NOUNS | {noun + "s" for noun in NOUNS} | {unit.lower() for unit in UNITS if len(unit) > 1}
COUNTED |= set(_PLURALS.split())
GOLD_MARK = "####"


def verify(gold: Any, completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``gold`` is the row's worked solution, which ends in ``#### 72``. ``status`` is how the completion ended: one cut
    off at ``"length"`` is worth 0 whatever it says, one that ended in ``"error"`` has no reward. Never raises on any
    text.
    """
    expected = _number(gold.rpartition(GOLD_MARK)[2], gold) if isinstance(gold, str) and GOLD_MARK in gold else None
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
    value = _number(_unboxed(answer), gold)
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


def _unboxed(text: str) -> str:
    r"""``\boxed{72}``, in dollars or not, as ``72``. A box with anything beside it stays as it is."""
    text = re.sub(r"(?<=[0-9])(?:\{,\}|\\,|,\\!\s?)(?=[0-9]{3})", ",", text.strip())
    for pattern in (DELIMITED, BOX, DELIMITED):
        if match := pattern.fullmatch(text):
            text = next(group for group in match.groups() if group).strip()
    return re.sub(r"\\(?=[$%])", "", text)


def _number(text: str, solution: str) -> Decimal | None:
    """The one number that ``text`` is, or None. ``solution`` is the row's, whose words may stand after it."""
    text = text.strip().translate(MINUS)
    match = NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    if match is None or (match["sign"] and match["minus"]) or not _is_unit(match["words"], solution):
        return None
    return Decimal(match["sign"] + match["minus"] + match["number"].replace(",", ""))


def _is_unit(words: str, solution: str) -> bool:
    """Whether words are units, things often counted, or what the solution counts; none of them changes a number."""
    found = re.findall(r"[a-z]+", TRAILING.sub("", words.strip().lower()))
    if not found or found in (["times"], ["percent"]):
        return True
    if found[0] in ("squared", "cubed") or all(word in FILLERS for word in found):
        return False
    own = {word for word in COUNTED_IN_TEXT.findall(solution.lower()) if not word.endswith(("ed", "ing", "ly"))}
    return all(word in own or word in COUNTED or word in FILLERS for word in found) and not any(
        map(changes_a_number, found)
    )
