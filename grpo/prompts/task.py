"""The task of a run: rows become prompts, in an order that is a function of the seed.

The one place that imports ``data``. Rows come from a task of ``data/`` (``data.name``), a file (``data.path``) or the
hub (``data.hub``); an unsound row is an error that names it. No question is both trained on and held out. Nothing here
has state that a restart could lose: a position in the order is always the same row (``prompt_order`` says which).
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

import data as data_room
from data import files, templates
from grpo.config import DataConfig, Recipe
from grpo.errors import UserError
from grpo.prompts.checks import lint, stop_token_ids
from grpo.randomness import Stream, permutation
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Part", "Task", "countdown_solution", "lint", "load_parts", "load_task", "needs_network", "stop_token_ids"]

# Arguments that every reward function gets; a column of that name would clash.
RESERVED_COLUMNS = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


@dataclass(frozen=True)
class Part:
    """Some rows of a source: those to train on, or those held out."""

    rows: files.Rows
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)


def load_task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Task:
    """Load, check and part the rows of a recipe. Raises UserError where they are unsound or too few."""
    return Task(recipe, tokenizer, *load_parts(recipe))


class Task:
    """Prompts (or supervised examples) of a run: those to train on by step, and those held out.

    ``notes`` tells what a person should know about the rows: some left out, fewer than asked for.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, train: Part, held_out: Part, notes: list[str]
    ):
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.train = train
        self.held_out = held_out
        self.notes = notes
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
        return [self.prompt(self.held_out, row) for row in self.held_out.ids]

    def examples(self, step: int) -> list[tuple[list[int], list[int]]]:
        """Supervised examples of a step: token ids of prompt and of completion, the latter with its EOS."""
        return [self.example(self.train, row) for row in self.train_rows(step)]

    @cached_property
    def eval_examples(self) -> list[tuple[list[int], list[int]]]:
        return [self.example(self.held_out, row) for row in self.held_out.ids]

    # --- order

    def train_rows(self, step: int) -> list[int]:
        """The rows of the step that follows ``step`` completed ones, where each takes ``prompts_per_step``."""
        return self.rows_at(step * self.recipe.training.prompts_per_step)

    def rows_at(self, start: int) -> list[int]:
        """A step's number of rows from position ``start`` on in the endless stream of epochs, each all rows once."""
        size = self.recipe.training.prompts_per_step
        epoch, offset = divmod(start, len(self.train))
        positions = self._epoch_order(epoch)[offset : offset + size].tolist()
        if len(positions) < size:
            positions += self._epoch_order(epoch + 1)[: size - len(positions)].tolist()
        return [self.train.ids[position] for position in positions]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation, rearranged where it begins in mid-step.

        A row that this step has taken from the epoch before comes after the step: the same row with the same sample
        indices would be the same draws. So an epoch depends on the one before; the latest is kept.
        """
        latest, order = self._latest_order
        if latest > epoch:
            latest, order = 0, self._permutation(0)
        size, n = self.recipe.training.prompts_per_step, len(self.train)
        for now in range(latest + 1, epoch + 1):
            begun = now * n % size  # rows of the step under way that are already taken
            taken, order = order[n - begun :], self._permutation(now)
            fresh = np.flatnonzero(~np.isin(order, taken))[: size - begun]
            if begun:
                order = np.concatenate([order[fresh], np.delete(order, fresh)])
        self._latest_order = epoch, order
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.recipe.data.shuffle:
            return np.arange(len(self.train))
        return permutation(self.recipe.training.seed, Stream.DATA_ORDER, epoch, len(self.train))

    # --- rows to tokens

    def prompt(self, part: Part, row: int) -> Prompt:
        """A row of the part's source as a prompt. Raises UserError if the chat template refuses it."""
        columns = dict(part.rows[row])
        question = columns.pop(self.recipe.data.prompt_column)
        if self.recipe.stage == "sft":
            del columns[self.recipe.data.completion_column]
        text, prefill = self.render(question, part.rows.place(row))
        return Prompt(row, question, text, self.encode(text), prefill, columns)

    def example(self, part: Part, row: int) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt and of its completion, the latter with EOS."""
        data, columns, place = self.recipe.data, part.rows[row], part.rows.place(row)
        text, prefill = self.render(columns[data.prompt_column], place)
        completion = self.answer(columns[data.completion_column], prefill, place)
        return self.encode(text), self.encode_answer(completion)

    def answer(self, completion: str | list[dict[str, str]], prefill: str, place: str) -> str:
        """The text to imitate: without what the prompt has prefilled, and without EOS."""
        if not isinstance(completion, str):
            if len(completion) != 1:
                raise UserError(f"{place}: the completion has {len(completion)} messages, need one")
            completion = completion[0]["content"]
        return completion.removeprefix(prefill).removesuffix(self.tokenizer.eos_token)

    def render(self, question: str | list[dict[str, str]], place: str) -> tuple[str, str]:
        """What the model sees of a question, and the tail of it that counts as answer."""
        data = self.recipe.data
        if data.template != "chat" and isinstance(question, str):
            return templates.plain(data.template, question)
        try:
            return templates.chat(question, self.tokenizer, data.system_prompt, **data.chat_template_kwargs)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: BOS once where the tokenizer puts one, and no EOS behind, which some put too.

        A chat template writes its special tokens itself, and so may a row; then none is added.
        """
        tokenizer = self.tokenizer
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        if self.recipe.data.template == "chat" or (bos and text.startswith(bos)):
            return tokenizer.encode(text, add_special_tokens=False)
        token_ids = tokenizer.encode(text)
        if eos and not text.endswith(eos) and token_ids[-1:] == [tokenizer.eos_token_id]:
            token_ids.pop()
        return token_ids

    def encode_answer(self, text: str) -> list[int]:
        """Token ids of an answer to imitate, with EOS."""
        return [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]


# --- what to train on and what to hold out ---------------------------------------------------------------------------


def countdown_solution(nums: Any, target: Any) -> str | None:
    """An expression that solves a countdown row; None where its columns are broken or nothing solves it."""
    from data import countdown  # which imports datasets: see _from_hub

    try:
        return next(countdown.solutions(list(nums), int(target)), None)
    except (TypeError, ValueError, OverflowError):
        return None


def load_parts(recipe: Recipe) -> tuple[Part, Part, list[str]]:
    """Rows to train on, rows held out, and notes; needs no tokenizer. Raises UserError."""
    data, notes = recipe.data, []
    rows, held_out_rows = _load_sources(recipe)
    if held_out_rows is None:
        held_out = Part(rows, _choose_questions(rows, recipe))
        expected = len(rows) - len(held_out)
    else:
        held_out = Part(held_out_rows, _choose_rows(held_out_rows, recipe))
        expected = len(rows)
        if len(held_out) != len(held_out_rows) or len(held_out) != data.eval_size:
            notes.append(
                f"{len(held_out)} of the {len(held_out_rows)} rows of {held_out_rows.source} are held out "
                f"(data.eval_size: {data.eval_size})"
            )
    asked = _questions(held_out.rows, data)
    held_out_questions = {asked[row] for row in held_out.ids}
    ids = [row for row, question in enumerate(_questions(rows, data)) if question not in held_out_questions]
    if len(ids) < expected:
        notes.append(f"{expected - len(ids)} rows repeat a held-out question and are left out of training")
    return Part(rows, _limit(ids, rows, recipe)), held_out, notes


def _limit(ids: list[int], rows: files.Rows, recipe: Recipe) -> list[int]:
    """The first ``train_size`` rows, if there are as many, and as many as a step needs."""
    wanted, size = recipe.data.train_size or len(ids), recipe.training.prompts_per_step
    if len(ids) < wanted:
        raise UserError(f"data.train_size: {wanted} rows are more than the {len(ids)} that {rows.source} leaves")
    if wanted < size:
        raise UserError(
            f"training.prompts_per_step: a step of {size} different prompts needs more than the {wanted} rows to train "
            f"on ({rows.source}); lower it, or data.eval_size, or give more rows"
        )
    return ids[:wanted]


def _choose_questions(rows: files.Rows, recipe: Recipe) -> list[int]:
    """``eval_size`` rows with different questions, chosen by the seed."""
    first_row: dict[str, int] = {}
    for row, question in enumerate(_questions(rows, recipe.data)):
        first_row.setdefault(question, row)
    size, candidates = recipe.data.eval_size, list(first_row.values())
    if size >= len(candidates):
        raise UserError(
            f"data.eval_size: can't hold out {size} of the {len(candidates)} different questions in {rows.source}; "
            f"lower it (0 holds out none), or give data.eval_path"
        )
    order = permutation(recipe.training.seed, Stream.DATA_SPLIT, 0, len(candidates))
    return sorted(candidates[place] for place in order[:size])


def _choose_rows(rows: files.Rows, recipe: Recipe) -> list[int]:
    """``eval_size`` rows chosen by the seed, or all if there are no more."""
    order = permutation(recipe.training.seed, Stream.DATA_SPLIT, 0, len(rows))
    return sorted(order[: recipe.data.eval_size].tolist())


def _questions(rows: files.Rows, data: DataConfig) -> list[str]:
    """Every row's question as text that can be compared."""
    return [q if isinstance(q, str) else json.dumps(q, sort_keys=True) for q in rows.column(data.prompt_column)]


# --- where rows come from --------------------------------------------------------------------------------------------


def _load_sources(recipe: Recipe) -> tuple[files.Rows, files.Rows | None]:
    """All rows, and those held out where they come apart from the others."""
    data = recipe.data
    columns = files.Columns(data.prompt_column, data.completion_column if recipe.stage == "sft" else None)
    apart = None
    if data.name:
        rows = _generate(recipe, "train", data.train_size, columns)
        if not data.eval_path and data.eval_size:
            apart = _generate(recipe, "eval", data.eval_size, columns)
    elif data.path:
        rows = _named("data.path", files.read_file, data.path, columns)
    else:
        rows = _from_hub(data, data.args.get("split", "train"), columns)
        if not data.eval_path and "eval_split" in data.args:
            apart = _from_hub(data, data.args["eval_split"], columns)
    if data.eval_path:
        apart = _named("data.eval_path", files.read_file, data.eval_path, columns)
    for source in filter(None, (rows, apart)):
        _check_use(data, source)
    return rows, apart


def _check_use(data: DataConfig, rows: files.Rows) -> None:
    """Whether the template takes these prompts, and the reward functions these columns."""
    if data.template != "chat" and not isinstance(rows[0][data.prompt_column], str):
        raise UserError(f"data.template: the prompts of {rows.source} are messages, which need template: chat")
    if clash := RESERVED_COLUMNS & rows[0].keys():
        raise UserError(f"{rows.source}: rename the column {min(clash)!r}: reward functions get that argument anyway")


def needs_network(recipe: Recipe) -> bool:
    """Whether a task's rows come from the hub. Raises UserError for arguments that the task does not take."""
    if not recipe.data.name:
        return False
    asks = getattr(_task_module(recipe), "needs_network", None)
    return asks is not None and asks(**recipe.data.args)


def _task_module(recipe: Recipe) -> ModuleType:
    """``data/<name>.py``. Raises UserError where there is none, or its ``build`` does not take ``data.args``."""
    name = recipe.data.name
    if name not in _task_names():
        raise UserError(f"data.name: no task {name!r}; there are {', '.join(_task_names())}")
    module = importlib.import_module(f"data.{name}")
    signature = inspect.signature(module.build)
    try:
        signature.bind("train", None, **_arguments(recipe))
    except TypeError as error:
        accepted = [parameter for parameter in signature.parameters if parameter not in ("split", "size")]
        raise UserError(f"data.args: {error}; {name} takes {', '.join(accepted)}") from error
    return module


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """``data.args`` may hold a ``seed`` instead of the run's."""
    return {"seed": recipe.training.seed, **recipe.data.args}


def _generate(recipe: Recipe, split: str, size: int | None, columns: files.Columns) -> files.Rows:
    """Rows that ``build`` of ``data/<name>.py`` makes."""
    build = _task_module(recipe).build
    dataset = _named("data.args", lambda: build(split, size, **_arguments(recipe)))
    return _named("data.name", files.check_dataset, dataset, f"{recipe.data.name}[{split}]", columns)


def _task_names() -> list[str]:
    """Modules of ``data/`` that define ``build``, told from their text: importing some takes seconds."""
    folders = [Path(folder) for folder in data_room.__path__]
    modules = [folder / f"{module.name}.py" for folder in folders for module in pkgutil.iter_modules([str(folder)])]
    return [file.stem for file in modules if file.is_file() and "\ndef build(" in file.read_text(encoding="utf-8")]


def _from_hub(data: DataConfig, split: str, columns: files.Columns) -> files.Rows:
    """Rows of a hub id. ``data.args`` go to ``load_dataset``, but for ``eval_split``: where held-out rows are."""
    import datasets  # here: a second and 100 MB that files do without

    arguments = {key: value for key, value in data.args.items() if key not in ("split", "eval_split")}
    try:
        dataset = datasets.load_dataset(data.hub, split=split, **arguments)
    except Exception as error:  # a hub fails in many ways, and each is the person's to know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.hub: can't load split {split!r} of {data.hub}: {reason}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(f"data.args: {data.hub} came as {type(dataset).__name__}, rows need a plain Dataset")
    return _named("data.hub", files.check_dataset, dataset, f"{data.hub}[{split}]", columns)


def _named(key: str, load: Callable[..., Any], *arguments: Any) -> Any:
    """``load(*arguments)``; what it finds wrong becomes a UserError with the recipe's key in front."""
    try:
        return load(*arguments)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
