"""R1-Zero's format: ``<think>…</think><answer>…</answer>``, exactly one of each tag, in order, nothing around them.

Strict on purpose: the policy finds and repeats whatever else passes (a second answer, junk after ``</answer>``, an
empty block, a nested ``<think>``). The format says nothing about the answer being right.

``verify`` pays for the whole form or nothing. ``graded`` pays for parts of it, for models that never write all of it by
chance.
"""

from __future__ import annotations

import re
from typing import Any

from rewards.tags import ANSWER, END_ANSWER, END_THINK, THINK, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "form"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER)
FORMAT = re.compile(r"\s*<think>(?P<thinking>.*)</think>\s*<answer>(?P<answer>.*)</answer>\s*", re.DOTALL)
IN_ORDER = re.compile(
    r"(?P<before>.*)<think>(?P<thinking>.*)</think>(?P<between>.*)<answer>(?P<answer>.*)</answer>(?P<after>.*)",
    re.DOTALL,
)
MAX_POINTS = 10


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


def graded(completion: str, *, prefill: str = "", status: str = "stop") -> Verdict:
    """The form of one completion in tenths: 1 exactly where ``verify`` says correct, less by every fault.

        1/10   for each of the four tags that is there exactly once
        1/10   for all four, once each and in order; only then can the rest be earned
        2/10   for thinking that is not empty
        2/10   for an answer that is not empty
        1/10   for nothing around the tags

    A repeated tag loses its own tenth and the rest of the list. So no text earns more by repeating a tag, and dozens of
    tags earn less than one of each. Tags of the prefill are the prompt's work: they earn nothing, and the other parts
    are scaled up to 1. The bare tags in order, with nothing in them, earn 0.6; a completion without tags 0.
    """
    strict = verify(completion, prefill=prefill, status=status)
    if strict.outcome is not Outcome.WRONG:
        return strict
    text = prefill + completion
    given = sum(prefill.count(tag) == 1 for tag in TAGS)
    points = sum(text.count(tag) == 1 for tag in TAGS) - given
    match = IN_ORDER.fullmatch(text) if points + given == len(TAGS) else None
    if match is not None:
        inside = [bool(match[part].strip()) for part in ("thinking", "answer")]
        outside = "".join(match[part] for part in ("before", "between", "after")).strip()
        points += 1 + 2 * sum(inside) + (not outside)
    return Verdict(Outcome.WRONG, strict.detail, max(0, points) / (MAX_POINTS - given))


BY_GRADED = {False: verify, True: graded}


def format_reward(
    prompts: list[Any],
    completions: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    *,
    graded: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """1 where the completion has the format, else 0, or with ``graded`` the tenths that ``graded()`` counts.

    TRL's signature: lists with one entry a completion.
    """
    judge = BY_GRADED[graded]
    verdicts = [
        judge(text_of(completion), prefill=prefill_i, status=status_i)
        for completion, prefill_i, status_i in zip(
            completions, prefill or [""] * len(completions), status or ["stop"] * len(completions), strict=True
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))
