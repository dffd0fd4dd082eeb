"""Similarity: how near the answer block is to the row's ``answer``, character by character, from 0 to 1.

It is ``difflib``'s ratio: twice the characters in matching blocks, over those of both texts. It is 1 for equal texts
alone. For tasks whose answer is a text of its own, such as ``data/reverse_text.py``; a number that is near is wrong.
"""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Any

from rewards.tags import NoAnswer, single_answer, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "answer"

MOST = 4  # times as many characters as the gold has, and a few more: beyond that comparing takes long and pays little
ROOM = 200


def verify(gold: Any, completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge one completion (text after the prompt; ``prefill`` is the prompt's tail that belongs to the answer).

    ``gold`` is the row's ``answer``. A completion cut off at ``"length"`` is worth 0, one that ended in ``"error"`` has
    no reward. Spaces around the answer do not count. Never raises on any text.
    """
    if not isinstance(gold, str) or not gold.strip():
        return Verdict(Outcome.GOLD_UNPARSEABLE, f"answer must be a text, got {gold!r:.40}")
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    try:
        answer, expected = single_answer(prefill + completion), gold.strip()
    except NoAnswer as why:
        return Verdict(Outcome.NO_ANSWER, str(why))
    if answer == expected:
        return Verdict(Outcome.CORRECT)
    if len(answer) > MOST * len(expected) + ROOM:
        return Verdict(Outcome.WRONG, f"{len(answer)} characters where {len(expected)} are right")
    ratio = SequenceMatcher(None, expected, answer, autojunk=False).ratio()
    return Verdict(Outcome.WRONG, f"near by {ratio:.2f}", ratio)


def similarity_reward(
    prompts: list[Any],
    completions: list[Any],
    answer: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """The similarity of each completion's answer to the row's. TRL's signature: lists with one entry a completion."""
    verdicts = [
        verify(gold, text_of(completion), prefill=prefill_i, status=status_i)
        for gold, completion, prefill_i, status_i in zip(
            answer,
            completions,
            prefill or [""] * len(completions),
            status or ["stop"] * len(completions),
            strict=True,
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def check_row(row: dict[str, Any]) -> str | None:
    """Why no completion could be right for the row, or None."""
    verdict = verify(row.get("answer"), "")
    return verdict.detail if verdict.outcome is Outcome.GOLD_UNPARSEABLE else None
