"""The recipe's section ``data``: where rows come from, and how they become prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo.config.base import LocalPath, NonNegativeInt, Positive, PositiveInt, Problem, Section, refuse
from grpo.config.rewards import RewardConfig

SOURCES = ("name", "path", "hub")


def _iso_date(given: str) -> str:
    try:
        datetime.fromisoformat(given)
    except ValueError:
        raise ValueError(f"expected a date as YYYY-MM-DD, got {given!r}") from None
    return given


class RowsConfig(Section):
    """Where the rows of one source come from, and how they become prompts."""

    name: LocalPath | None = None
    """A task of grpo's own by its name (`countdown`), or a function of yours: `my_task.py:build` or
    `package.module:build`. It is called as `build(split, size, seed=...)`, with `args` by name, for the splits
    `train` and `eval`; it returns a `datasets.Dataset`."""
    path: LocalPath | None = None
    """A `.jsonl`, `.parquet` or `.csv` file with a `prompt` column; other columns go to the reward functions. CSV has
    no types: every value is text, but for JSON lists and objects."""
    hub: str | None = None
    """A dataset id on the hub."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the task's builder (`seed`: a data seed apart from `training.seed`), or for a hub id those of
    `datasets.load_dataset` (`name`, `split`, and `eval_split` to hold out)."""
    template: Literal["none", "r1_zero", "tinyzero", "chat"] = "none"
    """How a question becomes the model's prompt: the R1-Zero paper's, TinyZero's (prefills `<think>`), the tokenizer's
    chat template, or nothing."""
    system_prompt: str | None = None
    """System message, with `template: chat`."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra arguments of the tokenizer's chat template."""
    chat_template_date: Annotated[str, AfterValidator(_iso_date)] = "2025-01-01"
    """Today, for a chat template that asks for the date: the clock would change the prompts from day to day, and a
    resumed run with them. As YYYY-MM-DD, or with a time behind it (YYYY-MM-DD HH:MM)."""
    prompt_column: str = "prompt"
    """Column that holds the question (a string or a list of messages)."""
    completion_column: str = "completion"
    """Column that holds the answer to imitate, with `stage: sft`."""
    train_size: PositiveInt | None = None
    """Rows to use for training; null uses all (generated tasks: their own default)."""
    eval_size: NonNegativeInt = 256
    """At most so many held-out rows."""
    eval_path: LocalPath | None = None
    """A file of held-out rows; without it `path` and `hub` data give up `eval_size` rows chosen by the seed."""

    def _problems(self, *instead: str) -> list[Problem]:
        """What does not fit together. ``instead`` are keys that might name sources in another way."""
        problems = []
        given = [key for key in SOURCES if getattr(self, key)]
        if len(given) != 1:
            text = f"give exactly one of name, path, hub (given: {', '.join(given) or 'none'})"
            problems.append(Problem((*SOURCES, *instead), text))
        if self.template != "chat":
            problems += [
                Problem((key, "template"), f"{key} is only used with template: chat (template is {self.template})")
                for key in ("system_prompt", "chat_template_kwargs")
                if getattr(self, key)
            ]
        return problems


class MixConfig(RowsConfig):
    label: Annotated[str, Field(pattern=r"^[\w.+-]+$")] | None = None
    """The source's name in metrics and rows; null takes it from name, path or hub."""
    weight: Positive = 1.0
    """Its share of a step's prompts, beside the weights of the others. A step has its share of each, rounded up or
    down."""
    rewards: list[RewardConfig] = Field(default_factory=list)
    """Reward functions that score the completions of this source alone, besides those of the recipe's `rewards`, which
    score every source's."""

    def called(self) -> str:
        """The label, or what the source is called without one."""
        place = self.name.rpartition(":")[2] if self.name else self.path or self.hub or ""
        name = Path(place).stem if self.path else Path(place).name
        return self.label or re.sub(r"[^\w.+-]+", "_", name)

    @model_validator(mode="after")
    def _one_source(self) -> MixConfig:
        refuse(self._problems())
        return self


class DataConfig(RowsConfig):
    mix: list[MixConfig] = Field(default_factory=list)
    """Several sources instead of one: each with the keys of this section that say where rows come from and how they
    become prompts, and a weight, a label and rewards of its own. Metrics and evaluation are told by source too;
    docs/data.md."""
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """What becomes of a row whose prompt (with `stage: sft`, or whose completion) is longer than its limit: an error
    that names it, or it is left out, and how many were is said."""
    shuffle: bool = True
    """Draw training rows in a permutation computed from seed and epoch; false keeps the file's order."""

    @model_validator(mode="after")
    def _sources_fit(self) -> DataConfig:
        refuse(self._mix_problems() if self.mix else self._problems("mix"))
        return self

    def _mix_problems(self) -> list[Problem]:
        own = [
            key
            for key in RowsConfig.model_fields
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True)
        ]
        problems = [
            Problem((key, "mix"), f"{key} is said by each source of mix, where there are several") for key in own
        ]
        labels = [source.called() for source in self.mix]
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            problems.append(Problem(("mix",), f"two sources of mix are called {twice[0]}: give them a label each"))
        return problems

    def sources(self) -> list[Source]:
        """Where rows come from: the sources of `mix`, or without it the one that this section names."""
        if not self.mix:
            return [Source("", "data", self, 1.0, [])]
        return [
            Source(source.called(), f"data.mix[{i}]", source, source.weight, source.rewards)
            for i, source in enumerate(self.mix)
        ]

    def held_out(self) -> int:
        """How many rows are held out at most, over all sources."""
        return sum(source.rows.eval_size for source in self.sources())


@dataclass(frozen=True)
class Source:
    """A source of rows: its label (empty without `mix`), its key in the recipe, and what the recipe says of it."""

    label: str
    where: str
    rows: RowsConfig
    weight: float
    rewards: Sequence[RewardConfig]
