"""The rows of an evaluation suite as prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data import files, suite_rows
from grpo.config import DataConfig, Recipe
from grpo.config.suites import Suite
from grpo.errors import UserError
from grpo.prompts.parts import Part, Parts, Share
from grpo.prompts.rows import find_task
from grpo.prompts.task import Task
from grpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedSuite:
    """A suite's rows as they are published. ``revision`` is their commit on the hub, empty where they are not from it;
    ``note`` says what a person should know of them."""

    name: str
    suite: Suite
    rows: files.Rows
    revision: str = ""
    note: str = ""


def load_suite(name: str, suite: Suite, seed: int, path: str | None = None, most: int | None = None) -> LoadedSuite:
    """The rows of a suite, or of the file at ``path`` in their place; the first ``most`` of them.

    Raises UserError where there are none.
    """
    source = suite.rows
    revision, notes = "", []
    try:
        if path is not None:
            rows = suite_rows.load(path=path)
        elif source.task:
            task = find_task(DataConfig(name=source.task, args=source.args), seed)
            rows = files.check_dataset(task.build("eval", source.count), f"{source.task}[eval]", files.Columns())
        elif suite_rows.is_installed(source.package):
            rows = suite_rows.load(package=source.package)
        else:
            if source.hub and source.revision is None:
                revision = suite_rows.newest(source.hub) or ""
                notes.append(f"its revision is not pinned: it was taken at {revision or 'the newest that was here'}")
            revision = source.revision or revision
            arguments = source.model_dump(include={"hub", "name", "split", "file", "path"})
            rows = suite_rows.load(revision=revision or None, **arguments)
    except ValueError as error:
        raise UserError(f"suite {name}: {error}") from error
    if source.count is not None and len(rows) != source.count:
        notes.append(f"{len(rows)} rows of {rows.source}, and the suite has {source.count}")
    if most is not None and most < len(rows):
        notes.append(f"the first {most} of {len(rows)} rows")
        rows = files.Rows([rows[i] for i in range(most)], rows.source)
    return LoadedSuite(name, suite, rows, revision, "; ".join(notes))


def suite_task(loaded: LoadedSuite, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The suite's questions as the held-out rows of a task that has no others, in the recipe's template.

    Raises UserError where rows can't be used, or the template refuses a question.
    """
    suite, data = loaded.suite, recipe.data.model_copy(update={"prompt_column": "prompt"})
    bare = suite.bare if is_bare(suite, recipe) else None
    try:
        asked = suite_rows.ask(loaded.rows, suite.form, bare.question if bare else suite.question, recipe.training.seed)
    except ValueError as error:
        raise UserError(f"suite {loaded.name}: {error}") from error
    if data.template == "chat" and suite.answer_begins:
        begun = {"role": "assistant", "content": suite.answer_begins}
        asked = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}, begun]} for row in asked]
    rows = files.Rows(asked, f"suite {loaded.name}")
    train, held_out = (Part((Share("", data, rows, ids),)) for ids in (range(0), range(len(asked))))
    return Task(data, recipe.training, "grpo", tokenizer, Parts(train, held_out, []))


def suite_questions(loaded: LoadedSuite) -> list[str]:
    """What the suite's rows ask, without the words around it. Raises UserError where rows can't be used."""
    try:
        return suite_rows.questions(loaded.rows, loaded.suite.form)
    except ValueError as error:
        raise UserError(f"suite {loaded.name}: {error}") from error


def suite_prompts(task: Task, loaded: LoadedSuite, recipe: Recipe) -> list[Prompt]:
    """The task's prompts. Where a program is to be gone on with, its beginning belongs to the answer."""
    if is_bare(loaded.suite, recipe) and loaded.suite.bare and loaded.suite.bare.continues:
        return [replace(prompt, prefill=prompt.text) for prompt in task.eval_prompts]
    return task.eval_prompts


def is_bare(suite: Suite, recipe: Recipe) -> bool:
    """Whether the model gets a text to go on with, without any template."""
    return recipe.data.template == "none" and suite.bare is not None
