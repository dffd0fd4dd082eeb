"""Reading ``<think>…</think><answer>…</answer>`` strictly: no trick with tags earns what the answer alone would not.

The text that is read is the model's own: the prompt's prefill (``<think>``, say) followed by the completion, never the
rest of the prompt, whose examples may contain tags. Tags are matched exactly and in lower case.
"""

from __future__ import annotations

from typing import Any

THINK, END_THINK, ANSWER, END_ANSWER = "<think>", "</think>", "<answer>", "</answer>"


class NoAnswer(ValueError):
    """The text does not hold exactly one answer; the message says what it holds instead."""


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """A completion as text: itself, or the content of the last message where completions are message lists (chat)."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


def after_thinking(text: str) -> str:
    """What follows the thinking, the only place where an answer counts.

    A text without think tags is all answer. One with them must close its thinking exactly once, since whoever thinks
    again after answering has not answered. The opening tag may be missing, because it may be the prompt's, but not
    repeated.

    Raises:
        NoAnswer: thinking that never ends, or is opened or closed more than once.
    """
    if END_THINK not in text and THINK not in text:
        return text
    thought, *rest = text.split(END_THINK)
    if len(rest) != 1:
        raise NoAnswer("the thinking never ends" if not rest else f"{len(rest)} {END_THINK} tags")
    if thought.count(THINK) > 1 or THINK in rest[0]:
        raise NoAnswer(f"more than one {THINK}, or one after {END_THINK}")
    return rest[0]


def single_answer(text: str) -> str:
    """The content of the one ``<answer>`` block after the thinking, stripped. Blocks inside the thinking do not count.

    Raises:
        NoAnswer: no block, an unclosed or empty one, or several.
    """
    answer_part = after_thinking(text)
    opened, closed = answer_part.count(ANSWER), answer_part.count(END_ANSWER)
    if (opened, closed) != (1, 1):
        raise NoAnswer(f"{opened} {ANSWER} and {closed} {END_ANSWER} tags after the thinking, expected one of each")
    before_close, _ = answer_part.split(END_ANSWER)
    _, found, answer = before_close.partition(ANSWER)
    if not found:
        raise NoAnswer(f"{END_ANSWER} comes before {ANSWER}")
    if not answer.strip():
        raise NoAnswer("the answer is empty")
    return answer.strip(" \t\r\n")  # ASCII alone: an exotic space is not ours to forgive
