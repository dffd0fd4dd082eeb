"""The completions that ``grpo audit`` tries on a row: the right answer in the recipe's form, and cheats.

A cheat says which kinds of reward must not pay for it: rewards that judge the answer, rewards that judge the form, or
both. Every text begins with ``<think>``; the audit takes it off where the prompt ends with it already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from grpo.audit.programs import programs, wrong_program
from grpo.prompts.rows import countdown_solution
from grpo.types import Status

ANSWER, FORM = frozenset({"answer"}), frozenset({"form"})
BOTH = ANSWER | FORM
THINKING = "Let me work this out step by step."
GOLD, WRONG = "gold", "a wrong answer"
FULL_WIDTH = str.maketrans("0123456789", "".join(chr(0xFF10 + digit) for digit in range(10)))


@dataclass(frozen=True)
class Form:
    """How a completion states an answer: in a template with ``{answer}`` in it, after thinking or without."""

    name: str
    template: str
    thinks: bool = True

    @property
    def has_tags(self) -> bool:
        return "<answer>" in self.template

    def body(self, answer: str) -> str:
        return self.template.replace("{answer}", answer)

    def whole(self, answer: str) -> str:
        return f"<think>{THINKING}</think>\n{self.body(answer)}" if self.thinks else self.body(answer)


TAGS = Form("<answer>…</answer>", "<answer>{answer}</answer>")
BOXED = Form("\\boxed{…}", "\\boxed{{answer}}")
BOXED_IN_TAGS = Form("<answer>\\boxed{…}</answer>", "<answer>\\boxed{{answer}}</answer>")
FENCED = Form("a fenced block", "```python\n{answer}\n```")
FENCED_IN_TAGS = Form("a fenced block in <answer> tags", "<answer>\n```python\n{answer}\n```\n</answer>")
USUAL = (
    *(TAGS, BOXED, BOXED_IN_TAGS, FENCED, FENCED_IN_TAGS),
    Form("the column alone", "{answer}", thinks=False),
    Form("the column after thinking", "{answer}"),
    Form("#### …", "#### {answer}", thinks=False),
    Form("\\boxed{…} without thinking", "\\boxed{{answer}}", thinks=False),
)
"""Forms in which people's own reward functions look for an answer."""


def forms(kind: str, has_format: bool) -> tuple[Form, ...]:
    """The forms to try for a kind of reward; of the built-in ones there is one, with tags if ``format`` is paid."""
    built_in = {
        "countdown": (TAGS, TAGS),
        "gsm8k": (TAGS, TAGS),
        "math": (BOXED, BOXED_IN_TAGS),
        "code": (FENCED, FENCED_IN_TAGS),
    }
    return (built_in[kind][has_format],) if kind in built_in else USUAL


@dataclass(frozen=True)
class Case:
    """One completion to try. A reward that judges something in ``against`` must not pay for it.

    ``text`` is whole: it includes the part that the prompt may have prefilled.
    """

    name: str
    text: str
    against: frozenset[str] = BOTH
    status: Status = Status.STOP


# --- right and wrong answers -----------------------------------------------------------------------------------------


def gold_answer(kind: str, columns: dict[str, Any]) -> str | None:
    """The right answer of a row in the form that its reward reads; None where the row does not tell it."""
    if kind == "countdown":
        return countdown_solution(columns.get("nums"), columns.get("target"))
    if kind == "gsm8k":
        return str(columns.get("answer", "")).rpartition("####")[2].strip() or None
    if kind == "code":
        return _first(columns, "solution", "canonical_solution", "solutions")
    if kind == "math":
        return bare(_first(columns, "answer"))
    return _first(columns, "answer", "solution", "completion", "target", "label")


def bare(answer: str | None) -> str | None:
    """The answer alone of a GSM8K solution (after ``####``) or of a MATH solution (in its last box)."""
    if answer is None or "####" in answer:
        return answer and answer.rpartition("####")[2].strip()
    boxed = answer.rpartition("\\boxed{")[2] if "\\boxed{" in answer else None
    if boxed is None:
        return answer
    depth = 1
    for place, character in enumerate(boxed):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return boxed[:place]
    return answer


def _first(columns: dict[str, Any], *names: str) -> str | None:
    for name in names:
        value = columns.get(name)
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict):  # a message
            value = value.get("content")
        if isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip("\n")
    return None


def wrong_answer(kind: str, gold: str | None, columns: dict[str, Any]) -> str:
    """An answer that looks like the right one and is not."""
    if kind == "countdown":
        nums = [int(number) for number in columns.get("nums") or [0]]
        values = {" + ": sum(nums), " * ": prod(nums), " - ": 2 * nums[0] - sum(nums)}
        sign = next((sign for sign, value in values.items() if value != columns.get("target")), None)
        return sign.join(map(str, nums)) if sign else "0"
    if gold is None:
        return "-987654321"
    numbers = list(re.finditer(r"[0-9]+", gold))
    if numbers:
        last = numbers[-1]
        return f"{gold[: last.start()]}{int(last[0][-15:]) + 1}{gold[last.end() :]}"
    if gold[::-1] != gold and "\\" not in gold and len(gold) > 3:
        return gold[::-1]
    return f"{gold}+1"


# --- cheats ----------------------------------------------------------------------------------------------------------


def cases(
    kind: str, form: Form, gold: str | None, columns: dict[str, Any], question: str, canary: str
) -> Iterator[Case]:
    """The gold completion, if there is one, and all cheats for a row. Names are unique.

    ``canary`` is a path that some of them try to create: if it exists afterwards, a reward ran the completion.
    """
    yield from _without_gold(question)
    if kind == "code":
        wrong = wrong_program(columns.get("tests"))
        for name, program in programs(columns.get("tests"), canary):
            yield Case(name, form.whole(program), ANSWER)
    else:
        wrong = wrong_answer(kind, gold, columns)
        yield from _answers(form, gold, wrong, canary)
        nums = columns.get("nums")
        if kind == "countdown" and nums and len(nums) > 1:
            yield Case("the target alone", form.whole(str(columns.get("target"))), ANSWER)
    yield Case(WRONG, form.whole(wrong), ANSWER)
    if gold is not None:
        yield Case(GOLD, form.whole(gold), frozenset())
        yield Case("the gold, truncated", form.whole(gold), BOTH, Status.LENGTH)
    yield from _places(form, gold or wrong, wrong, BOTH if gold is not None else FORM, kind == "code")


def _without_gold(question: str) -> Iterator[Case]:
    yield Case("nothing", "")
    yield Case("blanks", " \n\t ")
    yield Case("tags alone", "<think></think><answer></answer>")
    yield Case("tags with nothing said", "<think>so</think><answer>answer</answer>", ANSWER)
    yield Case("the prompt again", question)


def _places(form: Form, gold: str, wrong: str, both: frozenset[str], last_counts: bool) -> Iterator[Case]:
    """The right answer where it does not count, and forms that are nearly right.

    ``last_counts``: of several answers the last one is meant, so that one may correct oneself.
    """
    right, other, two = form.body(gold), form.body(wrong), both if form.has_tags else both & ANSWER
    whole = form.whole(gold)
    yield Case("the gold in the thinking alone", f"<think>{right}</think>", both)
    yield Case("the gold in the thinking, then another", f"<think>{right}</think>\n{other}", two)
    yield Case("thinking that never ends", f"<think>{right}", both)
    yield Case("the gold, then another", f"{whole}\n{other}", two)
    if form.has_tags:
        yield Case("another, then the gold", f"{form.whole(wrong)}\n{right}", FORM if last_counts else both)
    many = [form.body(f"{wrong}{i}") for i in range(25)]
    yield Case("fifty answers", form.whole(wrong) + "\n".join(["", *many, right, *many]), two)
    yield Case("text after the answer", f"{whole}\nand so on", FORM)
    yield Case("text before the thinking", f"Sure! {whole}", FORM)
    yield Case("thinking opened twice", f"<think>{whole}", FORM)
    yield Case("tags in capitals", re.sub(r"</?(think|answer)>", lambda tag: tag[0].upper(), whole), FORM)


def _answers(form: Form, gold: str | None, wrong: str, canary: str) -> Iterator[Case]:
    """Completions with something else in the place of the answer."""
    touch = f"__import__('pathlib').Path('{canary}').touch()"
    contents = {
        "a power tower": "99**98**97",
        "deep nesting": "(" * 4000 + wrong,
        "deep boxes": "\\boxed{" * 1000 + wrong,
        "code in place of an answer": touch,
        "a thousand numbers": " ".join(map(str, range(1000))),
    }
    if gold is not None:
        contents |= {
            "code that gives the gold": f"{touch} or {gold}",
            "two answers, or": f"{gold} or {wrong}",
            "two answers, a list": f"{wrong}, {gold}",
            "the gold with junk": f"{gold} @#! {wrong}",
            "wrong = gold": f"{wrong} = {gold}",
        }
        if re.search("[0-9]", gold):
            contents["full-width digits"] = gold.translate(FULL_WIDTH)
    for name, content in contents.items():
        yield Case(name, form.whole(content), ANSWER)
