"""The task of a run: its rows as prompts (or supervised examples), in an order that is a function of the seed.

Nothing here has state that a restart could lose: a position in the order is always the same row. ``order.py`` says
which positions a step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from grpo.config import DataConfig, Recipe, RowsConfig, TrainingConfig
from grpo.errors import UserError
from grpo.prompts import spoken, templates
from grpo.prompts.lengths import longer_than
from grpo.prompts.mixture import Mixture
from grpo.prompts.parts import Part, Parts, Share
from grpo.prompts.rows import check_enough, load_parts, rows_of_step
from grpo.prompts.teacher_column import read_teacher
from grpo.randomness import Stream, permutation
from grpo.types import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Question = str | list[dict[str, str]]
NO_TOKENS = "the prompt is empty: the tokenizer makes no token of it, or special tokens alone"


def load_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]] = ()) -> Task:
    """Load and check the rows of a recipe, and part them; with ``data.too_long: drop``, without those too long. Chat
    templates show ``tools`` in the prompts.

    Raises UserError where they are unsound or too few.
    """
    data, training = recipe.data, recipe.training
    column = recipe.teacher.column if recipe.teacher is not None else None
    parts = load_parts(data, training, recipe.stage, environment=recipe.environment is not None)
    task = Task(data, training, recipe.stage, tokenizer, parts, column, tools)
    if data.too_long == "error":
        return task
    train, held_out = (
        _drop_too_long(task, part, recipe.rollout.max_completion_length) for part in (task.train, task.held_out)
    )
    limits = "data.max_prompt_length" + (" or rollout.max_completion_length" if recipe.stage == "sft" else "")
    dropped = [
        f"{len(before) - len(after)} of {len(before)} rows {what} are longer than {limits} and are left out"
        for what, before, after in (("to train on", task.train, train), ("held out", task.held_out, held_out))
        if len(after) < len(before)
    ]
    sources = data.sources()
    weights = [source.weight for source in sources]
    for source, share in zip(sources, train.shares, strict=True):
        try:
            of_step = rows_of_step(source, weights, training.prompts_per_step)
            check_enough(len(share), of_step, share.rows, source.where)
        except UserError as error:
            raise UserError(f"{error} (data.too_long: drop: {'; '.join(dropped)})") from None
    return Task(data, training, recipe.stage, tokenizer, Parts(train, held_out, [*task.notes, *dropped]), column, tools)


def _drop_too_long(task: Task, part: Part, max_completion_length: int) -> Part:
    """The rows of a part that are within the limits, in their order. Rows that no template takes stay: the checks
    refuse them."""
    return Part(tuple(_within_limits(task, share, max_completion_length) for share in part.shares))


def _within_limits(task: Task, share: Share, max_completion_length: int) -> Share:
    data = share.data
    prompts: dict[int, str] = {}
    answers: dict[int, str] = {}
    completions = share.values(data.completion_column) if task.stage == "sft" else None
    for row, question in share.values(data.prompt_column).items():
        try:
            prompts[row], prefill = task.render(share, question, row)
            if completions is not None:
                answers[row] = task.answer(share, question, completions[row], prefill, row)
        except templates.TemplateHangs:
            raise
        except UserError:
            continue
    too_long = {
        *longer_than(task.data.max_prompt_length, prompts, task.tokenizer, partial(task.encode, data)),
        *longer_than(max_completion_length, answers, task.tokenizer, task.encode_answer),
    }
    return replace(share, ids=[row for row in share.ids if row not in too_long])


class Task:
    """Prompts (or supervised examples) of a run: those to train on by step, and those held out.

    ``notes`` tells a person what is unexpected about the rows: rows left out, fewer rows than asked for.
    """

    def __init__(
        self,
        data: DataConfig,
        training: TrainingConfig,
        stage: str,
        tokenizer: PreTrainedTokenizerBase,
        parts: Parts,
        teacher_column: str | None = None,
        tools: Sequence[dict[str, Any]] = (),
    ):
        self.data = data
        self.tools = list(tools)
        self.teacher_column = teacher_column
        self.prompts_per_step, self.seed = training.prompts_per_step, training.seed
        self.stage = stage
        self.tokenizer = tokenizer
        self.train, self.held_out, self.notes = parts
        self.mixture = _mixture(data, training, self.train)
        self._latest_order = 0, self._permutation(0)

    def train_prompts(self, step: int) -> list[Prompt]:
        """The ``prompts_per_step`` prompts of the step that follows ``step`` completed ones, all different rows."""
        return [self.prompt(self.train, row) for row in self.train_rows(step)]

    @property
    def columns(self) -> dict[str, list[str]]:
        """The columns of each source's prompts, by name: what reward functions get."""
        return {share.source: list(self.prompt(self.train, share.ids[0]).columns) for share in self.train.shares}

    @cached_property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out rows as prompts."""
        return [self.prompt(self.held_out, row) for row in self.held_out.ids]

    def examples(self, step: int) -> list[Example]:
        """Supervised examples of a step."""
        return [self.example(self.train, row) for row in self.train_rows(step)]

    @cached_property
    def eval_examples(self) -> dict[str, list[Example]]:
        """The held-out rows of each source as supervised examples."""
        return {share.source: [self.example(self.held_out, row) for row in share.ids] for share in self.held_out.shares}

    # --- order

    def train_rows(self, step: int) -> list[int]:
        """The rows of the step that follows ``step`` completed ones, if every step takes ``prompts_per_step``."""
        return self.rows_at(step * self.prompts_per_step)

    def rows_at(self, start: int) -> list[int]:
        """``prompts_per_step`` rows from position ``start`` on. Positions run over epochs without end; an epoch has
        every row once. With `data.mix` it is so for each source (``mixture.py``)."""
        if self.mixture is not None:
            return self.mixture.rows_at(start)
        size = self.prompts_per_step
        epoch, offset = divmod(start, len(self.train))
        positions = self._epoch_order(epoch)[offset : offset + size].tolist()
        if len(positions) < size:
            positions += self._epoch_order(epoch + 1)[: size - len(positions)].tolist()
        return [self.train.ids[position] for position in positions]

    def sources_at(self, start: int) -> list[int]:
        """The sources, as places in the recipe, of ``prompts_per_step`` positions from ``start`` on."""
        return self.mixture.sources_at(start) if self.mixture is not None else [0] * self.prompts_per_step

    def first_rows(self, number: int) -> list[int]:
        """The first rows of the first epoch; of `data.mix` the first different ones."""
        if self.mixture is not None:
            return self._first_of_mixture(number)
        return [self.train.ids[position] for position in self._permutation(0)[:number].tolist()]

    def _first_of_mixture(self, number: int) -> list[int]:
        rows = (row for start in count(0, self.prompts_per_step) for row in self.rows_at(start))
        found: dict[int, None] = {}
        while len(found) < number:
            found[next(rows)] = None
        return list(found)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, rearranged where it begins in the middle of a step.

        A row that the step has already taken from the epoch before moves behind the step: the same row with the same
        sample indices would give the same draws. So an epoch's order depends on the one before; the latest is kept.
        """
        latest, order = self._latest_order
        if latest > epoch:
            latest, order = 0, self._permutation(0)
        size, n = self.prompts_per_step, len(self.train)
        for now in range(latest + 1, epoch + 1):
            begun = now * n % size  # rows of the step under way that are already taken
            taken, order = order[n - begun :], self._permutation(now)
            fresh = np.flatnonzero(~np.isin(order, taken))[: size - begun]
            if begun:
                order = np.concatenate([order[fresh], np.delete(order, fresh)])
        self._latest_order = epoch, order
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.data.shuffle:
            return np.arange(len(self.train))
        return permutation(self.seed, Stream.DATA_ORDER, epoch, len(self.train))

    # --- rows to tokens

    def prompt(self, part: Part, row: int) -> Prompt:
        """A row of the part as a prompt. Raises UserError if the chat template refuses it, or it is empty."""
        share = part.share(row)
        columns = dict(share.row(row))
        question = columns.pop(share.data.prompt_column)
        if self.stage == "sft":
            del columns[share.data.completion_column]
        text, prefill = self.render(share, question, row)
        return Prompt(row, question, text, self.encode_prompt(share, text, row), prefill, columns, share.source)

    def example(self, part: Part, row: int) -> Example:
        """Token ids of a row's prompt and of its completion, the latter with EOS, and which of these are not to be
        imitated; and what its teacher says. Raises UserError where that is not of this row."""
        share = part.share(row)
        columns, place = share.row(row), share.place(row)
        question, answer = columns[share.data.prompt_column], columns[share.data.completion_column]
        text, prefill = self.render(share, question, row)
        prompt = self.encode_prompt(share, text, row)
        completion, environment = spoken.tokens(self._pieces(share, question, answer, prefill, row), self.tokenizer)
        if self.teacher_column is None:
            return Example(prompt, completion, environment=environment)
        taught = read_teacher(columns, self.teacher_column, prompt, completion, len(self.tokenizer), place)
        return Example(prompt, completion, taught, environment)

    def answer(
        self,
        share: Share,
        question: str | list[templates.Message],
        completion: str | list[dict[str, str]],
        prefill: str,
        row: int,
    ) -> str:
        """The text to imitate, without the prompt's prefill and without the last EOS; of several messages, with what
        stands between the model's. Raises UserError, which names the row, if that cannot be said."""
        found = self._pieces(share, question, completion, prefill, row)
        eos = self.tokenizer.eos_token
        return "".join(piece.text + eos * piece.eos for piece in found).removesuffix(eos)

    def _pieces(
        self,
        share: Share,
        question: str | list[templates.Message],
        completion: str | list[dict[str, str]],
        prefill: str,
        row: int,
    ) -> list[spoken.Piece]:
        if not isinstance(completion, str) and len(completion) > 1:
            try:
                return spoken.pieces(share.data, question, completion, self.tokenizer)
            except templates.TemplateHangs as error:
                raise templates.TemplateHangs(f"{share.place(row)}: {error}") from None
            except ValueError as error:
                raise UserError(f"{share.place(row)}: {error}") from error
        text = completion if isinstance(completion, str) else completion[0]["content"]
        return [spoken.Piece(self.one_answer(text, prefill), own=True, eos=True)]

    def one_answer(self, text: str, prefill: str) -> str:
        """An answer of one message to imitate, without the prompt's prefill and without EOS."""
        return text.removeprefix(prefill).removesuffix(self.tokenizer.eos_token)

    def render(self, share: Share, question: str | list[dict[str, str]], row: int) -> tuple[str, str]:
        """The text that the model sees for a row's question, and the tail of that text that counts as answer.

        Raises UserError, which names the row, if the chat template refuses the question.
        """
        try:
            return templates.of_question(share.data, question, self.tokenizer, self.tools)
        except templates.TemplateHangs as error:
            raise templates.TemplateHangs(f"{share.place(row)}: {error}") from None
        except ValueError as error:
            raise UserError(f"{share.place(row)}: {error}") from error

    def encode_prompt(self, share: Share, text: str, row: int) -> list[int]:
        """``encode``, with a UserError that names the row where no token is left to begin from."""
        token_ids = self.encode(share.data, text)
        if not token_ids:
            raise UserError(f"{share.place(row)}: {NO_TOKENS}")
        return token_ids

    def encode(self, data: RowsConfig, text: str) -> list[int]:
        """Token ids of a prompt, as ``templates.encode`` makes them."""
        return templates.encode(data, text, self.tokenizer)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer to imitate, with EOS."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


def _mixture(data: DataConfig, training: TrainingConfig, train: Part) -> Mixture | None:
    """The order of rows of several sources; None where there is one source without a label."""
    if not data.mix:
        return None
    return Mixture(
        [source.label for source in data.sources()],
        [source.weight for source in data.sources()],
        [share.ids for share in train.shares],
        size=training.prompts_per_step,
        seed=training.seed,
        shuffle=data.shuffle,
    )
