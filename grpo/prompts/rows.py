"""Where a run's rows come from, which of them are trained on, and which are held out.

Rows come from a task (``data.name``: one of ``data/``, or a function of the user's own), a file (``data.path``) or the
hub (``data.hub``). An unsound row is an error that names it. No question is both trained on and held out.

Beside ``suite.py`` this is the one module that imports ``data``, but for the words of a game.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import data as tasks
from data import files
from grpo import user_code
from grpo.config import DataConfig, RowsConfig, Source, TrainingConfig
from grpo.errors import UserError, first_line
from grpo.prompts.mixture import most_of_step
from grpo.prompts.parts import Part, Parts, Share
from grpo.randomness import Stream, permutation
from grpo.types import REWARD_KEYWORDS

# --- what to train on and what to hold out ---------------------------------------------------------------------------


def load_parts(data: DataConfig, training: TrainingConfig, stage: str, *, environment: bool = False) -> Parts:
    """Load the rows of all sources, check them, and part them. Needs no tokenizer.

    Rows whose prompts are the same ask the same question. Not so with an ``environment``, whose ``reset`` makes the
    task of all columns: then a question is a whole row, and rows of a prompt alone are questions of their own.

    Raises:
        UserError: there is no such source, its rows are unsound, or there are too few.
    """
    sources = data.sources()
    loaded = [_load(source, training.seed, stage, environment) for source in sources]
    notes = [note for _, _, note in loaded if note]
    held_out = _numbered(sources, [part for _, part, _ in loaded])
    asked = {
        question
        for share in held_out
        for question in _questions(share.rows, share.data, environment, share.first, share.ids)
    }
    shares: list[tuple[files.Rows, Sequence[int]]] = []
    weights = [source.weight for source in sources]
    for source, (rows, (held_out_rows, held_out_ids), _) in zip(sources, loaded, strict=True):
        ids = [row for row, question in enumerate(_questions(rows, source.rows, environment)) if question not in asked]
        repeated = len(rows) - len(ids) - (len(held_out_ids) if held_out_rows is rows else 0)
        if repeated:
            of = f" of {source.label}" if source.label else ""
            notes.append(f"{repeated} rows{of} repeat a held-out question and are left out of training")
        shares.append((rows, _limit(ids, rows, source, rows_of_step(source, weights, training.prompts_per_step))))
    return Parts(Part(tuple(_numbered(sources, shares))), Part(tuple(held_out)), notes)


def rows_of_step(source: Source, weights: Sequence[float], prompts_per_step: int) -> int:
    """How many different rows of a source a step may need."""
    return most_of_step(source.weight, weights, prompts_per_step) if source.label else prompts_per_step


def _numbered(sources: Sequence[Source], found: Sequence[tuple[files.Rows, Sequence[int]]]) -> list[Share]:
    """Rows of each source as shares, whose ids follow each other."""
    shares, first = [], 0
    for source, (rows, ids) in zip(sources, found, strict=True):
        shares.append(Share(source.label, source.rows, rows, [first + row for row in ids] if first else ids, first))
        first += len(rows)
    return shares


def _load(
    source: Source, seed: int, stage: str, environment: bool
) -> tuple[files.Rows, tuple[files.Rows, Sequence[int]], str]:
    """All rows of a source, those held out, and a note."""
    rows, held_out_rows = _load_sources(source, seed, stage)
    size = source.rows.eval_size
    if held_out_rows is None:
        return rows, (rows, _choose_questions(rows, source, seed, environment)), ""
    ids, note = _choose_rows(held_out_rows, size, seed), ""
    if len(ids) != len(held_out_rows) or len(ids) != size:
        note = (
            f"{len(ids)} of the {len(held_out_rows)} rows of {held_out_rows.source} are held out "
            f"({source.where}.eval_size: {size})"
        )
    return rows, (held_out_rows, ids), note


def _limit(ids: list[int], rows: files.Rows, source: Source, of_step: int) -> list[int]:
    """The first ``train_size`` rows. Raises UserError if there are fewer, or fewer than a step needs."""
    wanted = source.rows.train_size or len(ids)
    if len(rows if source.rows.name else ids) < wanted:  # a task makes as many as it is asked for
        raise UserError(
            f"{source.where}.train_size: {wanted} rows are more than the {len(ids)} that {rows.source} leaves"
        )
    check_enough(wanted, of_step, rows, source.where)
    return ids[:wanted]


def check_enough(count: int, of_step: int, rows: files.Rows, where: str) -> None:
    """Raise UserError where so many rows to train on are fewer than a step needs."""
    if count < of_step:
        what = (
            f"a step of {of_step} different prompts" if where == "data" else f"{of_step} different prompts of {where}"
        )
        raise UserError(
            f"training.prompts_per_step: {what} needs more than the {count} "
            f"rows to train on ({rows.source}); lower it, or {where}.eval_size, or give more rows"
        )


def _choose_questions(rows: files.Rows, source: Source, seed: int, environment: bool) -> list[int]:
    """``eval_size`` rows with different questions, chosen by the seed."""
    first_row: dict[str, int] = {}
    for row, question in enumerate(_questions(rows, source.rows, environment)):
        first_row.setdefault(question, row)
    size, candidates = source.rows.eval_size, list(first_row.values())
    if size >= len(candidates):
        raise UserError(
            f"{source.where}.eval_size: can't hold out {size} of the {len(candidates)} different questions in "
            f"{rows.source}; lower it (0 holds out none), or give {source.where}.eval_path"
        )
    order = permutation(seed, Stream.DATA_SPLIT, 0, len(candidates))
    return sorted(candidates[place] for place in order[:size])


def _choose_rows(rows: files.Rows, eval_size: int, seed: int) -> list[int]:
    """``eval_size`` rows chosen by the seed, or all if there are no more."""
    order = permutation(seed, Stream.DATA_SPLIT, 0, len(rows))
    return sorted(order[:eval_size].tolist())


def _questions(
    rows: files.Rows, data: RowsConfig, environment: bool, first: int = 0, ids: Sequence[int] | None = None
) -> list[str]:
    """Every row's question as text that can be compared, or those of these ids."""
    chosen = range(len(rows)) if ids is None else [row - first for row in ids]
    asked = rows.column(data.prompt_column)
    if not environment:
        return [q if isinstance(q := asked[row], str) else json.dumps(q, sort_keys=True) for row in chosen]
    if rows[0].keys() == {data.prompt_column}:
        return [f"row {row} of {id(rows)}" for row in chosen]
    columns = {name: rows.column(name) for name in sorted(rows[0])}
    return [json.dumps([of[row] for of in columns.values()], sort_keys=True, default=str) for row in chosen]


# --- sources ---------------------------------------------------------------------------------------------------------


def _load_sources(source: Source, seed: int, stage: str) -> tuple[files.Rows, files.Rows | None]:
    """All rows of a source, and the held-out rows where they have a file or split of their own."""
    data, where = source.rows, source.where
    columns = files.Columns(data.prompt_column, data.completion_column if stage == "sft" else None)
    apart = None
    if data.name:
        task = find_task(data, seed, where)
        rows = _generate(task, data.name, "train", data.train_size, columns)
        if not data.eval_path and data.eval_size:
            apart = _generate(task, data.name, "eval", data.eval_size, columns)
    elif data.path:
        rows = _named(f"{where}.path", files.read_file, data.path, columns)
    else:
        rows = _from_hub(source, data.args.get("split", "train"), columns)
        if not data.eval_path and "eval_split" in data.args:
            apart = _from_hub(source, data.args["eval_split"], columns)
    if data.eval_path:
        apart = _named(f"{where}.eval_path", files.read_file, data.eval_path, columns)
    for found in filter(None, (rows, apart)):
        _check_first_row(source, found, stage)
    return rows, apart


def _check_first_row(source: Source, rows: files.Rows, stage: str) -> None:
    """Whether the template takes these prompts, and reward functions these columns. Raises UserError."""
    data = source.rows
    if data.template != "chat" and not isinstance(rows[0][data.prompt_column], str):
        raise UserError(
            f"{source.where}.template: the prompts of {rows.source} are messages, which need template: chat"
        )
    clash = sorted(REWARD_KEYWORDS & rows[0].keys())
    if clash and stage != "sft":  # with sft no reward function is called
        raise UserError(
            f"{rows.source}: rename the column {clash[0]!r}: the trainer gives reward functions something else "
            "under that name"
        )


def _from_hub(source: Source, split: str, columns: files.Columns) -> files.Rows:
    """Rows of a hub id. ``data.args`` go to ``load_dataset``, except ``eval_split``, which names the held-out split."""
    import datasets  # here: it costs a second and 100 MB, and rows of a file do without

    data, where = source.rows, source.where
    arguments = {key: value for key, value in data.args.items() if key not in ("split", "eval_split")}
    try:
        dataset = datasets.load_dataset(data.hub, split=split, **arguments)
    except Exception as error:  # a hub fails in many ways; all are told in one line
        raise UserError(f"{where}.hub: can't load split {split!r} of {data.hub}: {first_line(error)}") from error
    if not isinstance(dataset, datasets.Dataset):
        raise UserError(f"{where}.args: {data.hub} came as {type(dataset).__name__}, rows need a plain Dataset")
    return _named(f"{where}.hub", files.check_dataset, dataset, f"{data.hub}[{split}]", columns)


QUESTIONS = ("prompt", "question", "problem", "Problem", "Question")
"""What data sets call the column of their questions."""


def read_questions(path: str, key: str, column: str | None = None) -> tuple[files.Rows, list[Any]]:
    """The rows of a file, and their questions: those in ``column``, or in the first that is called as usual.

    Raises UserError, with ``key`` in front, where the file is unsound.
    """
    there = files.column_names(path)
    chosen = column or next((name for name in QUESTIONS if name in there), QUESTIONS[0])
    rows = _named(key, files.read_file, path, files.Columns(chosen))
    return rows, rows.column(chosen)


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
    where: str = "data"


def find_task(data: RowsConfig, seed: int, where: str = "data") -> TaskSource:
    """The task that ``data.name`` names: ``data/<name>.py``, or ``file.py:build`` of the user's own.

    ``data.args`` may hold a ``seed`` that replaces the run's.

    Raises:
        UserError: there is no such task, or it does not take ``data.args``.
    """
    name, arguments = str(data.name), {"seed": seed, **data.args}
    users_own = user_code.is_place(name)
    if users_own:
        build = user_code.load(name, f"{where}.name")
        module = user_code.load_module(user_code.split_place(name, f"{where}.name")[0], f"{where}.name")
        _check_builder(build, name, where)
    elif name in tasks.TASKS:
        module = importlib.import_module(f"data.{name}")
        build = module.build
    else:
        raise UserError(
            f"{where}.name: no task {name!r}; there are {', '.join(tasks.TASKS)}, "
            "and file.py:build names a task of your own"
        )
    signature = inspect.signature(build)
    try:
        signature.bind("train", None, **arguments)
    except TypeError as error:
        accepted = [parameter for parameter in signature.parameters if parameter not in ("split", "size")]
        raise UserError(f"{where}.args: {error}; {name} takes {', '.join(accepted)}") from error
    return TaskSource(partial(build, **arguments), module, users_own, where)


def needs_network(source: Source, seed: int) -> bool:
    """Whether a task's rows come from the hub, which its module tells by a function of this name.

    Raises UserError as ``find_task`` does.
    """
    data = source.rows
    if not data.name:
        return False
    task = find_task(data, seed, source.where)
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


def _check_builder(build: Any, name: str, where: str) -> None:
    """Raise UserError unless ``build`` can be called as ``build(split, size, seed=…)``."""
    if not callable(build) or inspect.isclass(build):
        raise UserError(f"{where}.name: {name} is no function but {build!r}")
    try:
        inspect.signature(build).bind_partial("train", None, seed=0)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}.name: {name} does not take (split, size, seed): {error}. It is called as "
            "build('train' or 'eval', size, seed=…, and data.args by name)"
        ) from error


def _generate(task: TaskSource, name: str, split: str, size: int | None, columns: files.Columns) -> files.Rows:
    """The rows that a task makes for one split. Raises UserError where it fails or makes no sound rows."""
    if task.users_own:
        import datasets

        dataset = _run_users_code(task, f"{name}({split!r}, …)", lambda: task.build(split, size))
        if not isinstance(dataset, datasets.Dataset):
            raise UserError(
                f"{task.where}.name: {name}({split!r}, …) returned {type(dataset).__name__}, not a datasets.Dataset: "
                "make one by datasets.Dataset.from_list(rows)"
            )
    else:
        dataset = _named(f"{task.where}.args", task.build, split, size)
    return _named(f"{task.where}.name", files.check_dataset, dataset, f"{name}[{split}]", columns)


def _run_users_code(task: TaskSource, called: str, call: Callable[[], Any]) -> Any:
    """``call()`` of code in the user's module; whatever it raises becomes a UserError of one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        why = user_code.stopped_at(error)
        raise UserError(f"{task.where}.name: {called} failed: {why}") from error
