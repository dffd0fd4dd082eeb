"""R1-Zero's format: ``<think>…</think><answer>…</answer>``, exactly one of each tag, in order, nothing around them.

Strict on purpose: whatever else passes (a second answer, junk after ``</answer>``, an empty block, a nested
``<think>``) is found and repeated by the policy. The format says nothing about the answer being right.
"""

from __future__ import annotations

import re
from typing import Any

from rewards.tags import ANSWER, END_ANSWER, END_THINK, THINK, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
FORMAT = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)


def verify(completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge the form of one completion; ``prefill`` is the tail of the prompt that belongs to it (``<think>``).

    A completion cut off at ``"length"`` is worth 0, one that ended in ``"error"`` has no reward.
    """
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    text = prefill + completion
    counts = {tag: text.count(tag) for tag in TAGS}
    if set(counts.values()) != {1}:
        found = ", ".join(f"{count} {tag}" for tag, count in counts.items() if count != 1)
        return Verdict(Outcome.WRONG, f"expected one of each tag, found {found}")
    match = FORMAT.fullmatch(text)
    if match is None:
        return Verdict(Outcome.WRONG, "tags out of order, or text outside of them")
    for part in ("thinking", "answer"):
        if not match[part].strip():
            return Verdict(Outcome.WRONG, f"the {part} is empty")
    return Verdict(Outcome.CORRECT)


def format_reward(
    prompts: list[Any],
    completions: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the completion has the format, else 0. TRL's signature: lists with one entry a completion."""
    verdicts = [
        verify(text_of(completion), prefill=prefill_i, status=status_i)
        for completion, prefill_i, status_i in zip(
            completions, prefill or [""] * len(completions), status or ["stop"] * len(completions), strict=True
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))
