"""What every section of the recipe's schema is made of: strict fields, and all problems reported at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonEmpty = Annotated[str, Field(min_length=1)]


def _a_path(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path has")
    return os.path.expanduser(text)


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_a_path)]
"""A path on this machine, or a name that may be one (a hub id, ``file.py:name``): ``~`` is the home folder."""


@dataclass(frozen=True)
class Problem:
    """Keys that do not fit together, and a sentence about them.

    ``keys`` are all keys that the check looked at, as they are called in the section that checks (in the recipe itself
    with their section: ``rollout.top_p``). The message points at the first of them that was given, or at an override
    of any. It is not reported where one of them is wrong by itself.
    """

    keys: tuple[str, ...]
    text: str


class Refused(ValueError):
    """The problems that a section's validator found. Pydantic hands it on whole."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(problem.text for problem in problems))
        self.problems = tuple(problems)


def refuse(problems: Sequence[Problem]) -> None:
    """Raise all problems of a section at once; ``problems.py`` reports each by itself."""
    if problems:
        raise Refused(problems)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, use_attribute_docstrings=True)
