"""The recipe's section ``data``: where rows come from, and how they become prompts."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from grpo.config.base import LocalPath, NonNegativeInt, PositiveInt, Problem, Section, refuse


def _iso_date(given: str) -> str:
    try:
        datetime.fromisoformat(given)
    except ValueError:
        raise ValueError(f"expected a date as YYYY-MM-DD, got {given!r}") from None
    return given


class DataConfig(Section):
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
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens."""
    too_long: Literal["error", "drop"] = "error"
    """What becomes of a row whose prompt (with `stage: sft`, or whose completion) is longer than its limit: an error
    that names it, or it is left out, and how many were is said."""
    train_size: PositiveInt | None = None
    """Rows to use for training; null uses all (generated tasks: their own default)."""
    eval_size: NonNegativeInt = 256
    """At most so many held-out rows."""
    eval_path: LocalPath | None = None
    """A file of held-out rows; without it `path` and `hub` data give up `eval_size` rows chosen by the seed."""
    shuffle: bool = True
    """Draw training rows in a permutation computed from seed and epoch; false keeps the file's order."""

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        problems = []
        sources = ("name", "path", "hub")
        given = [key for key in sources if getattr(self, key)]
        if len(given) != 1:
            text = f"give exactly one of name, path, hub (given: {', '.join(given) or 'none'})"
            problems.append(Problem(sources, text))
        if self.template != "chat":
            problems += [
                Problem((key, "template"), f"{key} is only used with template: chat (template is {self.template})")
                for key in ("system_prompt", "chat_template_kwargs")
                if getattr(self, key)
            ]
        refuse(problems)
        return self
