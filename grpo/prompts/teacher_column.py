"""What a teacher says of a row's completion, as a column of the row holds it (``teacher.column``; ``grpo teach`` writes
it): an object of lists, one item for each token of the completion, its end included:

    {"prompt_ids": [5, 9], "token_ids": [17, 1], "top_ids": [[17, 4], [1, 8]],
     "top_logprobs": [[-0.1, -2.9], [-0.01, -5.0]]}

The token ids prove that rows and run cut the texts alike; nothing is learned from a distribution at another place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError
from grpo.types import TeacherSays

if TYPE_CHECKING:
    from grpo.prompts.parts import Part
    from grpo.prompts.task import Task

KEYS = ("prompt_ids", "token_ids", "top_ids", "top_logprobs")
COMPARED = 256  # rows whose texts are tokenized before a run
ROUNDING = 1e-3  # by which probabilities may sum to more than 1


def teacher_cell(prompt: list[int], completion: list[int], says: TeacherSays) -> dict[str, Any]:
    """The value of the column for a row."""
    ids, logprobs = says.top_ids or [], says.top_logprobs or []
    return {
        "prompt_ids": prompt,
        "token_ids": completion,
        "top_ids": [list(of_token) for of_token in ids],
        "top_logprobs": [[round(x, 6) for x in of_token] for of_token in logprobs],
    }


def read_teacher(
    row: dict[str, Any], column: str, prompt: list[int], completion: list[int], vocabulary: int, place: str
) -> TeacherSays:
    """What the teacher says of a row, whose texts are these tokens. Raises UserError, which names the row."""
    cell = row.get(column)
    if not isinstance(cell, dict) or any(not isinstance(cell.get(key), list) for key in KEYS):
        found = "is missing" if column not in row else f"is not an object of the lists {', '.join(KEYS)}"
        raise UserError(f"{place}: teacher.column: {column!r} {found}; `grpo teach RECIPE` writes such rows")
    for key, ours in (("prompt_ids", prompt), ("token_ids", completion)):
        if cell[key] != ours:
            raise UserError(
                f"{place}: teacher.column: the {key} of {column!r} are not the tokens of this row's text: the rows "
                "were made with another tokenizer or template, or their text has changed. Make them again (grpo teach)"
            )
    if problem := _problem(cell["top_ids"], cell["top_logprobs"], len(completion), vocabulary):
        raise UserError(f"{place}: teacher.column: {column!r}: {problem}")
    return TeacherSays((), cell["top_ids"], cell["top_logprobs"])


def column_errors(task: Task, part: Part) -> Iterator[str]:
    """An error where rows of a part can't be distilled from: of all rows their cell's form, of the first ones also
    whether its tokens are those of the row's text."""
    column, vocabulary = task.teacher_column, len(task.tokenizer)
    assert column is not None
    refused: list[str] = []
    for number, row in enumerate(part.ids):
        try:
            if number < COMPARED:
                task.example(part, row)
            else:
                cell = part.row(row).get(column)
                tokens = cell.get("token_ids") if isinstance(cell, dict) else None
                prompt = cell.get("prompt_ids") if isinstance(cell, dict) else None
                read_teacher(part.row(row), column, prompt or [], tokens or [], vocabulary, part.place(row))
        except UserError as error:
            refused.append(str(error))
    if refused:
        yield f"data: {len(refused)} of {len(part)} rows can't be distilled from, the first is {refused[0]}"


def _problem(ids: list[Any], logprobs: list[Any], tokens: int, vocabulary: int) -> str | None:
    """What is wrong with a teacher's likeliest tokens, or None."""
    if len(ids) != tokens or len(logprobs) != tokens:
        return f"{len(ids)} lists of ids and {len(logprobs)} of log-probabilities for {tokens} tokens"
    for at, (of_ids, of_logprobs) in enumerate(zip(ids, logprobs, strict=True), 1):
        if not of_ids or len(of_ids) != len(of_logprobs) or len(set(of_ids)) < len(of_ids):
            return f"token {at}: ids and log-probabilities must be as many, at least one, and no id twice"
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in of_ids):
            return f"token {at}: an id is outside of the tokenizer's {vocabulary}"
        if not all(isinstance(x, int | float) and math.isfinite(x) and x <= ROUNDING for x in of_logprobs):
            return f"token {at}: a log-probability is not a finite number below 0"
        if sum(map(math.exp, of_logprobs)) > 1 + ROUNDING:
            return f"token {at}: the probabilities sum to more than 1"
    return None
