"""A small audit before a run starts: are the rows' own right answers paid?

A reward that compares an integer with a text pays nobody, and a run without a signal shows that only hours later. So a
few rows' right answers go through the rewards once, beside a wrong one, as ``grpo audit`` tries them. The audit itself
tries much more.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from grpo.audit.cases import Form, bare, forms, gold_answer, wrong_answer
from grpo.audit.standard import kind_of, standard_of
from grpo.config import Recipe, RewardConfig
from grpo.errors import RunError, UserError
from grpo.prompts.rows import countdown_solution
from grpo.prompts.task import Task
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status

log = logging.getLogger("grpo")

ROWS = 16
SECONDS = 1.2  # no row is begun afterwards
PATIENCE = 1.0  # seconds for a call
ANSWER_COLUMNS = ("answer", "solution", "completion", "target", "label")  # in the order of ``gold_answer``


@dataclass
class _Tried:
    """A reward, and what it gave for right and wrong answers so far."""

    name: str
    reward: RewardConfig
    kind: str
    candidates: tuple[Form, ...]
    rows: int = 0
    best: list[float] = field(default_factory=list)  # of each row, what its right answer got in the best form
    above_wrong: bool = False
    unpaid: list[str] = field(default_factory=list)  # places of rows whose right answer was not paid in full
    other_type: str = ""  # what the column of the right answers holds, where that is not the text that people write


def audit_at_start(recipe: Recipe, task: Task, scorer: Scorer) -> list[str]:
    """A line for each reward for the answer that does not pay the right answers of up to ``ROWS`` rows.

    It takes less than two seconds, unless a function hangs. A function that fails is left to the run, and so are those
    that are async (they may ask a server, at a price) or need whole groups.
    """
    start = perf_counter()
    functions = recipe.functions()
    has_format = any(reward.name == "format" for reward in functions)
    tried = {
        place: _Tried(scorer.names[place], reward, kind, forms(kind, has_format))
        for place, reward in enumerate(functions)
        if (kind := kind_of(reward)) not in ("format", "shaping")
        and not reward.needs_group
        and not scorer.functions[place].signature.is_async
    }
    for source, row in _first_rows(task):
        for place, one in tried.items():
            if perf_counter() - start > SECONDS:
                break
            if not one.reward.scores(source):
                continue
            try:
                _try_row(one, task, row, lambda groups, place=place: scorer.try_out(groups, place, PATIENCE))
            except (RunError, UserError):  # a run tells it better, with the completion that it was about
                return []
    return [line for place, one in tried.items() for line in _finding(one.reward.where(place), one)]


def _first_rows(task: Task) -> list[tuple[str, int]]:
    """Up to ``ROWS`` rows of each source, evenly spread, with the source's label."""
    found = []
    for share in task.train.shares:
        ids = share.ids
        chosen = [ids[place * len(ids) // ROWS] for place in range(ROWS)] if len(ids) > ROWS else ids
        found += [(share.source, row) for row in chosen]
    return found


def warn_of_unpaid_answers(recipe: Recipe, task: Task, scorer: Scorer) -> None:
    """Log the lines of ``audit_at_start``. A run goes on all the same: the form of its answers may be its own."""
    for line in audit_at_start(recipe, task, scorer):
        log.warning(line)


def _try_row(one: _Tried, task: Task, row: int, score: Any) -> None:
    prompt, place = task.prompt(task.train, row), task.train.place(row)
    golds = _golds(one.kind, prompt.columns)
    if not golds:
        return
    cases = [(form, gold) for form in one.candidates for gold in golds]
    wrong = [wrong_answer(one.kind, gold, prompt.columns) for gold in golds] * len(one.candidates)
    texts = [form.whole(gold) for form, gold in cases]
    texts += [form.whole(answer) for (form, _), answer in zip(cases, wrong, strict=True)]
    if not one.rows:  # one alone at first: a function that hangs would hang on each
        values = score([_group(prompt, texts[:1])])
        if values[0] is None:
            return
    values = score([_group(prompt, texts)])
    both = zip(values, values[len(cases) :], cases, strict=False)
    pairs = [(right, other, form) for right, other, (form, _) in both if right is not None]
    if not pairs:
        return
    one.rows += 1
    value = max(pair[0] for pair in pairs)
    one.best.append(value)
    if any(b is not None and a > b for a, b, _ in pairs):
        one.above_wrong = True
        one.candidates = (max(pairs, key=lambda pair: pair[0] - (pair[1] or 0.0))[2],)
    if value < standard_of(one.reward).gold_at_least:
        one.unpaid.append(place)
    name, gold = _answer_column(prompt.columns)
    if gold is not None and gold != _as_written(gold):
        one.other_type = f"The column {name!r} holds {gold!r}, and a completion is text: {_as_written(gold)!r}"


def _golds(kind: str, columns: dict[str, Any]) -> list[str]:
    """The right answer of a row; for a function whose kind is not known, in the forms that it may mean."""
    found = [gold_answer(kind, columns)]
    if kind == "user":
        if isinstance(gold := _answer_column(columns)[1], int | float | str):
            found = [_as_written(gold)]
        found += [bare(found[0]), countdown_solution(columns.get("nums"), columns.get("target"))]
    return list(dict.fromkeys(gold for gold in found if gold))


def _answer_column(columns: dict[str, Any]) -> tuple[str, Any]:
    """The column of the right answer and what it holds, of a list its first; nothing where there is none."""
    name = next((name for name in ANSWER_COLUMNS if columns.get(name) not in (None, [])), "")
    gold = columns.get(name)
    return name, gold[0] if isinstance(gold, list) else gold


def _as_written(gold: Any) -> Any:
    """The text that people write for a right answer: ``3`` for 3.0, and no blanks around."""
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)
    return str(gold).strip() if isinstance(gold, str | int | float) else gold


def _group(prompt: Prompt, texts: list[str]) -> Group:
    thinks = prompt.prefill.rstrip().endswith("<think>")
    texts = [text.removeprefix("<think>") if thinks else text for text in texts]
    return Group(prompt, [Completion([0], [0.0], Status.STOP, text, []) for text in texts])


def _finding(where: str, one: _Tried) -> list[str]:
    if not one.rows or not one.unpaid:
        return []
    least = standard_of(one.reward).gold_at_least
    if one.kind != "user":
        return [
            f"{where} ({one.name}): the right answer of {len(one.unpaid)} of {one.rows} rows is not paid {least:g} "
            f"(first {one.unpaid[0]}); grpo audit says more"
        ]
    if one.above_wrong or max(one.best) >= 1:
        return []
    given = f"{min(one.best):g}" if min(one.best) == max(one.best) else f"{min(one.best):g} to {max(one.best):g}"
    cure = f"{one.other_type}; are the two equal to it? " if one.other_type else ""
    return [
        f"{where} ({one.name}): the right answers of {one.rows} rows get {given} in every usual form, no more than "
        f"wrong ones. {cure}If it looks for another form, grpo audit --gold tries that; if it judges no answer, say "
        "shaping: true"
    ]
