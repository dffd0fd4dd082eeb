"""Where a run's rows come from, which of them are trained on, and which are held out.

Rows come from a task (``data.name``: one of ``data/``, or a function of the user's own), a file (``data.path``) or the
hub (``data.hub``). An unsound row is an error that names it. No question is both trained on and held out.

This is the one module that imports ``data``.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import data as tasks
from data import files
from grpo import user_code
from grpo.config import DataConfig, TrainingConfig
from grpo.errors import UserError, first_line
from grpo.randomness import Stream, permutation
from grpo.types import REWARD_KEYWORDS


@dataclass(frozen=True)
class Part:
    """Some rows of a source: those to train on, or those held out."""

    rows: files.Rows
    ids: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)


class Parts(NamedTuple):
    """The rows of a run. ``notes`` tells a person what is unexpected: rows left out, fewer rows than asked for."""

    train: Part
    held_out: Part
    notes: list[str]


# --- what to train on and what to hold out ---------------------------------------------------------------------------


def load_parts(data: DataConfig, training: TrainingConfig, stage: str) -> Parts:
    """Load the rows, check them, and part them. Needs no tokenizer.

    Raises:
        UserError: there is no such source, its rows are unsound, or there are too few.
    """
    rows, held_out_rows = _load_sources(data, training.seed, stage)
    notes = []
    if held_out_rows is None:
        held_out = Part(rows, _choose_questions(rows, data, training.seed))
        expected = len(rows) - len(held_out)
    else:
        held_out = Part(held_out_rows, _choose_rows(held_out_rows, data.eval_size, training.seed))
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
    return Parts(Part(rows, _limit(ids, rows, data.train_size, training.prompts_per_step)), held_out, notes)


def _limit(ids: list[int], rows: files.Rows, train_size: int | None, prompts_per_step: int) -> list[int]:
    """The first ``train_size`` rows. Raises UserError if there are fewer, or fewer than a step needs."""
    wanted = train_size or len(ids)
    if len(ids) < wanted:
        raise UserError(f"data.train_size: {wanted} rows are more than the {len(ids)} that {rows.source} leaves")
    check_enough(wanted, prompts_per_step, rows)
    return ids[:wanted]


def check_enough(count: int, prompts_per_step: int, rows: files.Rows) -> None:
    """Raise UserError where so many rows to train on are fewer than a step needs."""
    if count < prompts_per_step:
        raise UserError(
            f"training.prompts_per_step: a step of {prompts_per_step} different prompts needs more than the {count} "
            f"rows to train on ({rows.source}); lower it, or data.eval_size, or give more rows"
        )


def _choose_questions(rows: files.Rows, data: DataConfig, seed: int) -> list[int]:
    """``eval_size`` rows with different questions, chosen by the seed."""
    first_row: dict[str, int] = {}
    for row, question in enumerate(_questions(rows, data)):
        first_row.setdefault(question, row)
    size, candidates = data.eval_size, list(first_row.values())
    if size >= len(candidates):
        raise UserError(
            f"data.eval_size: can't hold out {size} of the {len(candidates)} different questions in {rows.source}; "
            f"lower it (0 holds out none), or give data.eval_path"
        )
    order = permutation(seed, Stream.DATA_SPLIT, 0, len(candidates))
    return sorted(candidates[place] for place in order[:size])


def _choose_rows(rows: files.Rows, eval_size: int, seed: int) -> list[int]:
    """``eval_size`` rows chosen by the seed, or all if there are no more."""
    order = permutation(seed, Stream.DATA_SPLIT, 0, len(rows))
    return sorted(order[:eval_size].tolist())


def _questions(rows: files.Rows, data: DataConfig) -> list[str]:
    """Every row's question as text that can be compared."""
    return [q if isinstance(q, str) else json.dumps(q, sort_keys=True) for q in rows.column(data.prompt_column)]


# --- sources ---------------------------------------------------------------------------------------------------------


def _load_sources(data: DataConfig, seed: int, stage: str) -> tuple[files.Rows, files.Rows | None]:
    """All rows, and the held-out rows where they have a source of their own."""
    columns = files.Columns(data.prompt_column, data.completion_column if stage == "sft" else None)
    apart = None
    if data.name:
        task = find_task(data, seed)
        rows = _generate(task, data.name, "train", data.train_size, columns)
        if not data.eval_path and data.eval_size:
            apart = _generate(task, data.name, "eval", data.eval_size, columns)
    elif data.path:
        rows = _named("data.path", files.read_file, data.path, columns)
    else:
        rows = _from_hub(data, data.args.get("split", "train"), columns)
        if not data.eval_path and "eval_split" in data.args:
            apart = _from_hub(data, data.args["eval_split"], columns)
    if data.eval_path:
        apart = _named("data.eval_path", files.read_file, data.eval_path, columns)
    for source in filter(None, (rows, apart)):
        _check_first_row(data, source, stage)
    return rows, apart


def _check_first_row(data: DataConfig, rows: files.Rows, stage: str) -> None:
    """Whether the template takes these prompts, and reward functions these columns. Raises UserError."""
    if data.template != "chat" and not isinstance(rows[0][data.prompt_column], str):
        raise UserError(f"data.template: the prompts of {rows.source} are messages, which need template: chat")
    clash = sorted(REWARD_KEYWORDS & rows[0].keys())
    if clash and stage != "sft":  # with sft no reward function is called
        raise UserError(
            f"{rows.source}: rename the column {clash[0]!r}: the trainer gives reward functions something else "
            "under that name"
        )


def _from_hub(data: DataConfig, split: str, columns: files.Columns) -> files.Rows:
    """Rows of a hub id. ``data.args`` go to ``load_dataset``, except ``eval_split``, which names the held-out split."""
    import datasets  # here: it costs a second and 100 MB, and rows of a file do without

    arguments = {key: value for key, value in data.args.items() if key not in ("split", "eval_split")}
    try:
        dataset = datasets.load_dataset(data.hub, split=split, **arguments)
    except Exception as error:  # a hub fails in many ways; all are told in one line
        raise UserError(f"data.hub: can't load split {split!r} of {data.hub}: {first_line(error)}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(f"data.args: {data.hub} came as {type(dataset).__name__}, rows need a plain Dataset")
    return _named("data.hub", files.check_dataset, dataset, f"{data.hub}[{split}]", columns)


def _named(key: str, load: Callable[..., Any], *arguments: Any) -> Any:
    """``load(*arguments)``; its ValueError becomes a UserError with the recipe's key in front."""
    try:
        return load(*arguments)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error


# --- tasks: ours, and the user's own ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskSource:
    """What makes the rows of ``data.name``: ``build(split, size)``, with ``data.args`` and the seed bound to it."""

    build: Callable[[str, int | None], Any]
    module: ModuleType
    users_own: bool


def find_task(data: DataConfig, seed: int) -> TaskSource:
    """The task that ``data.name`` names: ``data/<name>.py``, or ``file.py:build`` of the user's own.

    ``data.args`` may hold a ``seed`` that replaces the run's.

    Raises:
        UserError: there is no such task, or it does not take ``data.args``.
    """
    name, arguments = str(data.name), {"seed": seed, **data.args}
    users_own = user_code.is_place(name)
    if users_own:
        build = user_code.load(name, "data.name")
        module = user_code.load_module(user_code.split_place(name, "data.name")[0], "data.name")
        _check_builder(build, name)
    elif name in tasks.TASKS:
        module = importlib.import_module(f"data.{name}")
        build = module.build
    else:
        raise UserError(
            f"data.name: no task {name!r}; there are {', '.join(tasks.TASKS)}, "
            "and file.py:build names a task of your own"
        )
    signature = inspect.signature(build)
    try:
        signature.bind("train", None, **arguments)
    except TypeError as error:
        accepted = [parameter for parameter in signature.parameters if parameter not in ("split", "size")]
        raise UserError(f"data.args: {error}; {name} takes {', '.join(accepted)}") from error
    return TaskSource(partial(build, **arguments), module, users_own)


def needs_network(data: DataConfig, seed: int) -> bool:
    """Whether a task's rows come from the hub, which its module tells by a function of this name.

    Raises UserError as ``find_task`` does.
    """
    if not data.name:
        return False
    task = find_task(data, seed)
    asks = getattr(task.module, "needs_network", None)
    if asks is None:
        return False
    if task.users_own:
        return bool(_run_users_code(task, "needs_network(…)", lambda: asks(**data.args)))
    return asks(**data.args)


def countdown_solution(nums: Any, target: Any) -> str | None:
    """An expression that solves a countdown row; None where its columns are broken or nothing solves it."""
    from data import countdown  # here: it imports datasets, as ``_from_hub`` does

    try:
        return next(countdown.solutions(list(nums), int(target)), None)
    except (TypeError, ValueError, OverflowError):
        return None


def _check_builder(build: Any, name: str) -> None:
    """Raise UserError unless ``build`` can be called as ``build(split, size, seed=…)``."""
    if not callable(build) or inspect.isclass(build):
        raise UserError(f"data.name: {name} is no function but {build!r}")
    try:
        inspect.signature(build).bind_partial("train", None, seed=0)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.name: {name} does not take (split, size, seed): {error}. It is called as "
            "build('train' or 'eval', size, seed=…, and data.args by name)"
        ) from error


def _generate(task: TaskSource, name: str, split: str, size: int | None, columns: files.Columns) -> files.Rows:
    """The rows that a task makes for one split. Raises UserError where it fails or makes no sound rows."""
    if task.users_own:
        import datasets

        dataset = _run_users_code(task, f"{name}({split!r}, …)", lambda: task.build(split, size))
        if not isinstance(dataset, datasets.Dataset):
            raise UserError(
                f"data.name: {name}({split!r}, …) returned {type(dataset).__name__}, not a datasets.Dataset: "
                "make one by datasets.Dataset.from_list(rows)"
            )
    else:
        dataset = _named("data.args", task.build, split, size)
    return _named("data.name", files.check_dataset, dataset, f"{name}[{split}]", columns)


def _run_users_code(task: TaskSource, called: str, call: Callable[[], Any]) -> Any:
    """``call()`` of code in the user's module; whatever it raises becomes a UserError of one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        why = user_code.stopped_at(error)
        raise UserError(f"data.name: {called} failed: {why}") from error
