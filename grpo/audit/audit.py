"""``grpo audit``: tries a recipe's rewards and its environment on its own rows, before a policy finds their holes.

Each row gives a completion with the right answer, which must be paid, and some thirty cheats, which must not be paid
(``cases.py`` makes them). They are scored like rollouts, in the same processes. The audit needs no weights, and it
needs a tokenizer only for ``template: chat``.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from grpo.audit.cases import GOLD, Case, Form, cases, forms, gold_answer
from grpo.audit.environment import audit_environment
from grpo.audit.outcome import Outcome, section
from grpo.audit.standard import Standard, kind_of, standard_of
from grpo.config import ENVIRONMENT, ModelConfig, Recipe, RewardConfig
from grpo.errors import UserError
from grpo.prompts.parts import Share
from grpo.prompts.rows import load_parts
from grpo.prompts.task import Task
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status

PROBED = 20  # rows on which a user's function is tried with every usual form
PATIENCE = 2  # a cheat is left out once a function could not score it this many times


@dataclass(frozen=True)
class AuditedRow:
    """A row that is audited: its place (``file:line``), its prompt, and all its columns."""

    place: str
    prompt: Prompt
    columns: dict[str, Any]

    @property
    def question(self) -> str:
        prompt = self.prompt.prompt
        return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def audit(recipe: Recipe, rows: int, gold: str | None = None, tell: Callable[[str], Any] = print) -> list[str]:
    """Audit every reward on up to ``rows`` rows to train on and as many held out; returns a line for each finding.

    ``gold`` is a template of a right completion with the names of columns in it (``#### {answer}``). A reward of the
    user's own needs it if its form is not one of the usual forms. ``tell`` gets the report, reward by reward.

    Raises:
        UserError: recipe, rows or functions are unsound.
        RunError: a function broke its contract.
    """
    if not recipe.functions():
        raise UserError("rewards: the recipe has none to audit")
    parts = load_parts(recipe.data, recipe.training, recipe.stage, environment=recipe.environment is not None)
    tokenizer = _tokenizer(recipe.model)
    task = Task(recipe.data, recipe.training, recipe.stage, tokenizer, parts)
    sample = [
        _row(task, share, row)
        for part in (parts.train, parts.held_out)
        for share in part.shares
        for row in spread(share.ids, rows)
    ]
    tell(_header(task, rows, sample))
    findings = []
    for label in (source.label for source in recipe.data.sources()):
        of_source, telling, unknown = [row for row in sample if row.prompt.source == label], False, False
        for index, reward in enumerate(recipe.functions()):
            if not reward.scores(label):
                continue
            if reward.name == ENVIRONMENT:
                unknown = True  # no text alone is paid: it is played, below
                continue
            outcome = _Audit(recipe, reward, of_source, tokenizer, gold).run()
            text, found = section(f"{reward.where(index)} on {label}" if label else reward.where(index), outcome)
            tell(text)
            findings += found
            telling = telling or outcome.tells_right_from_wrong
            unknown = unknown or outcome.gold_missing == len(of_source)
        if not telling and not unknown:
            findings.append(f"no reward of {label or 'the recipe'} pays a right answer more than a wrong one")
    if recipe.environment is not None:
        findings += audit_environment(recipe, [(row.place, row.columns) for row in sample], tell)
    return findings


def spread(ids: Sequence[int], size: int) -> list[int]:
    """``size`` of the ids, evenly spread, or all."""
    return [ids[position * len(ids) // size] for position in range(size)] if size < len(ids) else list(ids)


def _header(task: Task, rows: int, sample: list[AuditedRow]) -> str:
    """What is audited: how many rows, with which tokenizer, behind which prefill."""
    parts = [
        (len(share), f"{what} of {share.source}" if share.source else what)
        for part, what in ((task.train, "to train on"), (task.held_out, "held out"))
        for share in part.shares
    ]
    lines = ["rows      " + ", ".join(f"{min(rows, total)} of {total} {what}" for total, what in parts)]
    prefills = sorted({row.prompt.prefill for row in sample})
    if task.tokenizer is None:
        lines.append("tokenizer none on this machine: words are counted for tokens")
        if any(share.data.template == "chat" for share in task.train.shares):
            lines.append("template  chat, which the tokenizer would bring: completions are judged without a prefill")
    if any(prefills):
        lines.append("prefill   " + ", ".join(map(repr, prefills)))
    return "\n".join(lines)


def _tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer, or None where this machine does not have it."""
    from grpo.model.loading import load_tokenizer

    try:
        return load_tokenizer(model)
    except UserError:
        return None


def _row(task: Task, share: Share, row: int) -> AuditedRow:
    data, columns = share.data, dict(share.row(row))
    others = {name: value for name, value in columns.items() if name != data.prompt_column}
    question = columns[data.prompt_column]
    plain = data.template != "chat" and isinstance(question, str)
    text, prefill = task.render(share, question, row) if plain or task.tokenizer is not None else ("", "")
    return AuditedRow(share.place(row), Prompt(row, question, text, [], prefill, others, share.source), columns)


# --- one reward ------------------------------------------------------------------------------------------------------


class _Audit:
    """One reward over all rows of a source."""

    def __init__(self, recipe: Recipe, reward: RewardConfig, rows: list[AuditedRow], tokenizer: Any, gold: str | None):
        self.recipe, self.reward, self.rows, self.tokenizer = recipe, reward, rows, tokenizer
        beside = [other for other in recipe.functions() if other.scores(rows[0].prompt.source)]
        self.has_format = any(other.name == "format" for other in beside)
        self.standard: Standard = standard_of(reward)
        kinds = [kind_of(other) for other in beside]
        answering = [kind for kind in kinds if kind not in ("format", "shaping")]
        own = kind_of(reward)
        # A reward for the form, or for the length, is tried with the completions of the reward for the answer.
        self.kind = own if own in answering else next(iter(answering), "user")
        self.template = gold if own == "user" or (own == "shaping" and self.kind == "user") else None

    def run(self) -> Outcome:
        scoring = self.recipe.scoring.model_copy(update={"workers": 1, "max_failure_rate": 1.0})
        with TemporaryDirectory() as folder, Scorer([self.reward], scoring) as scorer, _first_warning() as warnings:
            self.scorer, self.canary = scorer, Path(folder) / "ran"
            form = self._form()
            outcome = Outcome(
                scorer.names[0], scorer.functions[0].spec.source, self.standard, form.name, len(self.rows), self.kind
            )
            for number, row in enumerate(self.rows):
                self._audit_row(outcome, row, form, number)
            outcome.first_failure = next(iter(warnings), "")
        return outcome

    def _form(self) -> Form:
        """The form of this reward's right completions; of several, the one that pays most on the first rows."""
        if self.template is not None:
            return self._given_form(self.template)
        candidates = forms(self.kind, self.has_format)
        if kind_of(self.reward) == "format" and self.kind == "user":
            candidates = candidates[:1]
        if len(candidates) == 1:
            return candidates[0]
        paid: Counter[Form] = Counter()
        for number, row in enumerate(self.rows[:PROBED]):
            gold = self._gold(row)
            if gold is not None:
                tried = [Case(form.name, form.whole(gold)) for form in candidates]
                values, _, _ = self._score(row, tried, number)
                paid.update({form: value or 0.0 for form, value in zip(candidates, values, strict=True)})
        return max(candidates, key=lambda form: paid[form])  # the first of equals

    def _given_form(self, template: str) -> Form:
        """The form of ``--gold``: where it names one column, that is the answer, else the whole of it is."""
        names = [name for name in self.rows[0].columns if f"{{{name}}}" in template]
        if not names:
            raise UserError(f"--gold: {template!r} names no column of the rows ({', '.join(self.rows[0].columns)})")
        if len(names) == 1:
            self.template = f"{{{names[0]}}}"
            return Form(template, template.replace(self.template, "{answer}"), thinks=False)
        return Form(template, "{answer}", thinks=False)

    def _gold(self, row: AuditedRow) -> str | None:
        if self.template is None:
            return gold_answer(self.kind, row.columns)
        return fill(self.template, row.columns)

    def _audit_row(self, outcome: Outcome, row: AuditedRow, form: Form, number: int) -> None:
        gold = self._gold(row)
        tried = [
            case
            for case in cases(self.kind, form, gold, row.columns, row.question, str(self.canary))
            if outcome.unscored[case.name] < PATIENCE or case.name == GOLD
        ]
        values, verdicts, seconds = self._score(row, tried, number)
        outcome.add(row.place, tried, values, verdicts, seconds)
        if gold is None and self.kind == "countdown":
            outcome.unsolvable(row.place)
        value = next((value for case, value in zip(tried, values, strict=True) if case.name == GOLD), 0.0)
        if gold is not None and outcome.gold_fails(value):
            alone = [case for case in tried if case.name == GOLD]
            _, why, _ = self._score(row, alone, number)
            outcome.explain_gold(", ".join(why))
        if self.canary.exists():
            outcome.executed += 1
            self.canary.unlink()

    def _score(self, row: AuditedRow, tried: list[Case], number: int) -> tuple[list[float | None], Counter[str], float]:
        """Rewards of the cases as one group of the row's prompt, their verdicts, and the seconds it took."""
        group = Group(row.prompt, [self._completion(row.prompt, case) for case in tried])
        start = perf_counter()
        self.scorer.score([group], number)
        seconds = perf_counter() - start
        name = self.scorer.names[0]
        return group.rewards_by_function[name], Counter(group.verdicts[name]), seconds

    def _completion(self, prompt: Prompt, case: Case) -> Completion:
        text = case.text
        if prompt.prefill.rstrip().endswith("<think>"):
            text = text.removeprefix("<think>")
        ids = self._token_ids(text)
        if case.status is Status.LENGTH:
            limit = self.recipe.rollout.max_completion_length
            ids = (ids * (limit // max(1, len(ids)) + 1))[:limit]
        return Completion(ids, [0.0] * len(ids), case.status, text, [])

    def _token_ids(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [zlib.crc32(word.encode("utf-8", "replace")) for word in re.findall(r"\w+|\S", text)] + [0]
        return [*self.tokenizer.encode(text, add_special_tokens=False, verbose=False), self.tokenizer.eos_token_id]


def fill(template: str, columns: dict[str, Any]) -> str | None:
    """``{name}`` replaced by the columns' values; other braces stay. None where the row lacks a value it names."""
    named = [name for name in columns if f"{{{name}}}" in template]
    if not named or any(columns[name] is None for name in named):
        return None
    for name in named:
        template = template.replace(f"{{{name}}}", str(columns[name]))
    return template


@contextmanager
def _first_warning() -> Any:
    """Keeps the scorer's warnings about rows off the screen; yields the list that collects them."""
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    logger, handler = logging.getLogger("grpo.scoring"), Keep()
    logger.addHandler(handler)
    logger.propagate, before = False, logger.propagate
    try:
        yield kept
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
