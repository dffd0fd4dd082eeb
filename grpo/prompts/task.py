"""The task of a run: its rows as prompts (or supervised examples), in an order that is a function of the seed.

Nothing here has state that a restart could lose: a position in the order is always the same row. ``order.py`` says
which positions a step takes.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from grpo.config import DataConfig, Recipe, TrainingConfig
from grpo.errors import UserError
from grpo.prompts import templates
from grpo.prompts.lengths import longer_than
from grpo.prompts.rows import Part, Parts, check_enough, load_parts
from grpo.randomness import Stream, permutation
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NO_TOKENS = "the prompt is empty: the tokenizer makes no token of it, or special tokens alone"


def load_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Load and check the rows of a recipe, and part them; with ``data.too_long: drop``, without those too long.

    Raises UserError where they are unsound or too few.
    """
    data, training = recipe.data, recipe.training
    task = Task(data, training, recipe.stage, tokenizer, load_parts(data, training, recipe.stage))
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
    try:
        check_enough(len(train), training.prompts_per_step, train.rows)
    except UserError as error:
        raise UserError(f"{error} (data.too_long: drop: {'; '.join(dropped)})") from None
    return Task(data, training, recipe.stage, tokenizer, Parts(train, held_out, [*task.notes, *dropped]))


def _drop_too_long(task: Task, part: Part, max_completion_length: int) -> Part:
    """The rows of a part that are within the limits, in their order. Rows that no template takes stay: the checks
    refuse them."""
    prompts: dict[int, str] = {}
    answers: dict[int, str] = {}
    questions = part.rows.column(task.data.prompt_column)  # by column: reading rows one by one is slow
    completions = part.rows.column(task.data.completion_column) if task.stage == "sft" else None
    for row in part.ids:
        place = part.rows.place(row)
        try:
            prompts[row], prefill = task.render(questions[row], place)
            if completions is not None:
                answers[row] = task.answer(completions[row], prefill, place)
        except templates.TemplateHangs:
            raise
        except UserError:
            continue
    too_long = {
        *longer_than(task.data.max_prompt_length, prompts, task.tokenizer, task.encode),
        *longer_than(max_completion_length, answers, task.tokenizer, task.encode_answer),
    }
    return Part(part.rows, [row for row in part.ids if row not in too_long])


class Task:
    """Prompts (or supervised examples) of a run: those to train on by step, and those held out.

    ``notes`` tells a person what is unexpected about the rows: rows left out, fewer rows than asked for.
    """

    def __init__(
        self, data: DataConfig, training: TrainingConfig, stage: str, tokenizer: PreTrainedTokenizerBase, parts: Parts
    ):
        self.data = data
        self.prompts_per_step, self.seed = training.prompts_per_step, training.seed
        self.stage = stage
        self.tokenizer = tokenizer
        self.train, self.held_out, self.notes = parts
        self._latest_order = 0, self._permutation(0)

    def train_prompts(self, step: int) -> list[Prompt]:
        """The ``prompts_per_step`` prompts of the step that follows ``step`` completed ones, all different rows."""
        return [self.prompt(self.train, row) for row in self.train_rows(step)]

    @property
    def columns(self) -> list[str]:
        """The columns of a prompt, by name: what reward functions get."""
        return list(self.prompt(self.train, self.train.ids[0]).columns)

    @cached_property
    def eval_prompts(self) -> list[Prompt]:
        """The held-out rows as prompts."""
        return [self.prompt(self.held_out, row) for row in self.held_out.ids]

    def examples(self, step: int) -> list[tuple[list[int], list[int]]]:
        """Supervised examples of a step: token ids of prompt and of completion, the latter with its EOS."""
        return [self.example(self.train, row) for row in self.train_rows(step)]

    @cached_property
    def eval_examples(self) -> list[tuple[list[int], list[int]]]:
        """The held-out rows as supervised examples."""
        return [self.example(self.held_out, row) for row in self.held_out.ids]

    # --- order

    def train_rows(self, step: int) -> list[int]:
        """The rows of the step that follows ``step`` completed ones, if every step takes ``prompts_per_step``."""
        return self.rows_at(step * self.prompts_per_step)

    def rows_at(self, start: int) -> list[int]:
        """``prompts_per_step`` rows from position ``start`` on. Positions run over epochs without end; an epoch has
        every row once."""
        size = self.prompts_per_step
        epoch, offset = divmod(start, len(self.train))
        positions = self._epoch_order(epoch)[offset : offset + size].tolist()
        if len(positions) < size:
            positions += self._epoch_order(epoch + 1)[: size - len(positions)].tolist()
        return [self.train.ids[position] for position in positions]

    def first_rows(self, number: int) -> list[int]:
        """The first rows of the first epoch."""
        return [self.train.ids[position] for position in self._permutation(0)[:number].tolist()]

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
        """A row of the part's source as a prompt. Raises UserError if the chat template refuses it, or it is empty."""
        columns = dict(part.rows[row])
        question = columns.pop(self.data.prompt_column)
        if self.stage == "sft":
            del columns[self.data.completion_column]
        text, prefill = self.render(question, part.rows.place(row))
        return Prompt(row, question, text, self.encode_prompt(text, part.rows.place(row)), prefill, columns)

    def example(self, part: Part, row: int) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt and of its completion, the latter with EOS."""
        columns, place = part.rows[row], part.rows.place(row)
        text, prefill = self.render(columns[self.data.prompt_column], place)
        completion = self.answer(columns[self.data.completion_column], prefill, place)
        return self.encode_prompt(text, place), self.encode_answer(completion)

    def answer(self, completion: str | list[dict[str, str]], prefill: str, place: str) -> str:
        """The text to imitate, without the prompt's prefill and without EOS. Raises UserError if it is several
        messages."""
        if not isinstance(completion, str):
            if len(completion) != 1:
                raise UserError(f"{place}: the completion has {len(completion)} messages, need one")
            completion = completion[0]["content"]
        return completion.removeprefix(prefill).removesuffix(self.tokenizer.eos_token)

    def render(self, question: str | list[dict[str, str]], place: str) -> tuple[str, str]:
        """The text that the model sees for a question, and the tail of that text that counts as answer.

        Raises UserError if the chat template refuses the question; ``place`` names its row.
        """
        try:
            return templates.of_question(self.data, question, self.tokenizer)
        except templates.TemplateHangs as error:
            raise templates.TemplateHangs(f"{place}: {error}") from None
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error

    def encode_prompt(self, text: str, place: str) -> list[int]:
        """``encode``, with a UserError that names the row where no token is left to begin from."""
        token_ids = self.encode(text)
        if not token_ids:
            raise UserError(f"{place}: {NO_TOKENS}")
        return token_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as ``templates.encode`` makes them."""
        return templates.encode(self.data, text, self.tokenizer)

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer to imitate, with EOS."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
