"""What rows hold of a teacher: what is read, and what is refused with its row."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from grpo.errors import UserError
from grpo.prompts.teacher_column import read_teacher

CELL = {"prompt_ids": [3], "token_ids": [4, 1], "top_ids": [[4, 5], [1]], "top_logprobs": [[-0.1, -3.0], [0.0]]}


def test_a_sound_cell_is_read() -> None:
    says = read_teacher({"t": CELL}, "t", [3], [4, 1], 10, "rows:1")
    assert says.top_ids == [[4, 5], [1]]
    assert torch.tensor(says.top_logprobs[0]).tolist() == pytest.approx([-0.1, -3.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "'t' is missing; `grpo teach RECIPE` writes such rows"),
        ({"top_ids": None}, "'t' is not an object of the lists prompt_ids, token_ids, top_ids, top_logprobs"),
        ({"token_ids": [4, 2]}, "the token_ids of 't' are not the tokens of this row's text"),
        ({"prompt_ids": [9]}, "the prompt_ids of 't' are not the tokens of this row's text"),
        ({"top_ids": [[4, 5]]}, "1 lists of ids and 2 of log-probabilities for 2 tokens"),
        (
            {"top_ids": [[4, 4], [1]]},
            "token 1: ids and log-probabilities must be as many, at least one, and no id twice",
        ),
        ({"top_ids": [[4, 5], [10]]}, "token 2: an id is outside of the tokenizer's 10"),
        ({"top_logprobs": [[-0.1, float("nan")], [0.0]]}, "token 1: a log-probability is not a finite number below 0"),
        ({"top_logprobs": [[-0.1, -0.1], [0.0]]}, "token 1: the probabilities sum to more than 1"),
    ],
)
def test_an_unsound_cell_is_refused_with_its_row(changes: dict[str, Any] | None, message: str) -> None:
    row = {} if changes is None else {"t": json.loads(json.dumps(CELL)) | changes}
    with pytest.raises(UserError) as said:
        read_teacher(row, "t", [3], [4, 1], 10, "rows:1")
    assert str(said.value).startswith("rows:1: teacher.column: ")
    assert message in str(said.value)
