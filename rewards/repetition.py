"""Repetition: a penalty by the share of n-grams that repeat earlier ones.

The n-gram penalty of Demystifying Long CoT (arXiv:2502.03373) in the form that open-r1 and others use: one
number for the completion instead of one for each token. It never pays.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from rewards.length import repeated_share, units_of
from rewards.tags import text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "shaping"


def verify(
    units: Sequence[Hashable], *, ngram_size: int = 20, max_penalty: float = -1.0, status: str = "stop"
) -> Verdict:
    """``max_penalty`` times the share of n-grams of ``units`` (token ids, or words) that have occurred before.

    A truncated completion is judged like any other, because most of those are loops. One that ended in ``"error"`` has
    no reward.

    Raises:
        ValueError: ``ngram_size`` is below 1, or ``max_penalty`` above 0 (repeating would be paid).
    """
    if ngram_size < 1 or max_penalty > 0:
        raise ValueError(f"need ngram_size >= 1 and max_penalty <= 0, got {ngram_size} and {max_penalty}")
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    share = repeated_share(units, ngram_size)
    if share == 0:
        return Verdict(Outcome.CORRECT, score=0.0)
    return Verdict(Outcome.WRONG, f"{share:.0%} of the {ngram_size}-grams repeat earlier ones", max_penalty * share)


def repetition_reward(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]] | None = None,
    status: list[str] | None = None,
    *,
    ngram_size: int = 20,
    max_penalty: float = -1.0,
    **kwargs: Any,
) -> list[float | None]:
    """From 0 (no n-gram twice) to ``max_penalty`` (all the same). TRL's signature: lists with one entry a completion.

    n-grams are of tokens if ``completion_ids`` are given (trainers give them), because a text without spaces has no
    words to count. Otherwise they are of words.
    """
    units: list[Sequence[Hashable]] = (
        list(completion_ids) if completion_ids is not None else [units_of(text_of(c)) for c in completions]
    )
    verdicts = [
        verify(units_i, ngram_size=ngram_size, max_penalty=max_penalty, status=status_i)
        for units_i, status_i in zip(units, status or ["stop"] * len(units), strict=True)
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))
