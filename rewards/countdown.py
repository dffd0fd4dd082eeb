"""Countdown: reach ``target`` from ``nums`` with + - * / and parentheses, every number exactly once.

The answer is model output, so it is never executed. It is parsed by a grammar of integers, four operators and
parentheses, at most 200 ASCII characters long, and computed in exact fractions. Powers, ``//``, decimals, unary minus,
leading zeros, ``_``, hex and comments are not in the grammar; ``99**98**97`` is refused like any other typo.

    answer := sum [ "=" target ]        product := atom { ("*" | "/") atom }
    sum    := product { ("+" | "-") product }     atom := integer | "(" sum ")"
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.tags import NoAnswer, single_answer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "answer"

MAX_LENGTH = 200
ALLOWED = re.compile(r"[0-9+\-*/()= \t]+")
INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
TOKEN = re.compile(r"[ \t]*(0|[1-9][0-9]*|[-+*/()])")


class Unparseable(ValueError):
    """The answer is not in the grammar; the message says why."""


def verify(nums: Sequence[int], target: int, completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``status`` is how the completion ended: one cut off at ``"length"`` is worth 0 whatever it says, one that ended in
    ``"error"`` has no reward. Never raises on any text.
    """
    try:
        numbers, goal = _gold(nums, target)
    except (TypeError, ValueError) as broken:
        return Verdict(Outcome.GOLD_UNPARSEABLE, str(broken))
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        return _judge(single_answer(prefill + completion), numbers, goal)
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))
    except Unparseable as why:
        return Verdict(Outcome.UNPARSEABLE, str(why))


def countdown_reward(
    prompts: list[Any],
    completions: list[Any],
    nums: list[Any],
    target: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the expression is right, 0 where it is not, None where the row's own ``nums`` or ``target`` is broken.

    TRL's signature: every argument is a list with one entry a completion.
    """
    verdicts = [
        verify(nums_i, target_i, text_of(completion), prefill=prefill_i, status=status_i)
        for nums_i, target_i, completion, prefill_i, status_i in zip(
            nums,
            target,
            completions,
            prefill or [""] * len(completions),
            status or ["stop"] * len(completions),
            strict=True,
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for this row, or None."""
    try:
        _gold(row.get("nums"), row.get("target"))
    except (TypeError, ValueError) as broken:
        return str(broken)
    return None


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """Value of an expression of the grammar and the integers it uses, in order.

    Raises:
        Unparseable: the expression is not in the grammar.
        ZeroDivisionError: it divides by zero.
    """
    parser = _Parser(_tokens(expression))
    value = parser.sum()
    if parser.next is not None:
        raise Unparseable(f"unexpected {parser.next!r} after a complete expression")
    return value, parser.integers


def _gold(nums: Any, target: Any) -> tuple[list[int], int]:
    """The row's columns as ints (numpy's are accepted). Raises TypeError or ValueError that says what is wrong."""
    if isinstance(nums, (str, bytes)) or not hasattr(nums, "__iter__"):
        raise TypeError(f"nums must be a list of integers, got {nums!r}")
    for value in (*nums, target):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"nums and target must be integers, got nums={nums!r}, target={target!r}")
    numbers = [operator.index(n) for n in nums]
    if not numbers or min(numbers) < 0:
        raise ValueError(f"nums must hold at least one number and none below 0, got {nums!r}")
    return numbers, operator.index(target)


def _judge(answer: str, numbers: list[int], target: int) -> Verdict:
    if len(answer) > MAX_LENGTH:
        raise Unparseable(f"{len(answer)} characters, more than {MAX_LENGTH}")
    if not ALLOWED.fullmatch(answer):
        raise Unparseable(f"only integers, + - * / and parentheses are allowed, got {answer!r}")
    expression, *claims = answer.split("=")
    if len(claims) > 1:
        raise Unparseable("more than one =")
    claim = claims[0].strip() if claims else None
    if claim is not None and not INTEGER.fullmatch(claim):
        raise Unparseable(f"after = only the target may stand, got {claim!r}")
    try:
        value, used = evaluate(expression)
    except ZeroDivisionError:
        return Verdict(Outcome.WRONG, "division by zero")
    if sorted(used) != sorted(numbers):
        return Verdict(Outcome.WRONG, f"uses {sorted(used)}, must use each of {sorted(numbers)} exactly once")
    if value != target:
        return Verdict(Outcome.WRONG, f"equals {value}, not {target}")
    if claim is not None and int(claim) != target:
        return Verdict(Outcome.WRONG, f"claims = {claim}, not {target}")
    return Verdict(Outcome.CORRECT)


def _tokens(expression: str) -> list[str]:
    tokens, position, end = [], 0, len(expression.rstrip())
    while position < end:
        match = TOKEN.match(expression, position)
        if match is None:
            raise Unparseable(f"{expression[position:].strip()[:20]!r} is not a number, operator or parenthesis")
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent, two frames a parenthesis; the length limit bounds the depth at 100 parentheses."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = iter(tokens)
        self.integers: list[int] = []
        self.next: str | None = None
        self._advance()

    def _advance(self) -> None:
        self.next = next(self._tokens, None)

    def sum(self) -> Fraction:
        value = self._product()
        while self.next in ("+", "-"):
            sign = self.next
            self._advance()
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._atom()
        while self.next in ("*", "/"):
            sign = self.next
            self._advance()
            factor = self._atom()
            value = value * factor if sign == "*" else value / factor
        return value

    def _atom(self) -> Fraction:
        token = self.next
        self._advance()
        if token == "(":
            value = self.sum()
            if self.next != ")":
                raise Unparseable("a parenthesis is not closed")
            self._advance()
            return value
        if token is None or not token.isdigit():
            raise Unparseable(f"expected a number or '(', got {token or 'the end'!r}")
        self.integers.append(int(token))
        return Fraction(int(token))
