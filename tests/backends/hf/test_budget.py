"""The cache's memory between prompts and sequences: within the bound, and room for at least one of each."""

from __future__ import annotations

import pytest

from grpo.backends.base import Request
from grpo.backends.hf.budget import Budget
from grpo.backends.hf.kv_cache import head_tokens
from grpo.errors import UserError
from grpo.types import Prompt

LIMIT = 96
pytestmark = pytest.mark.usefixtures("both_layouts")
# Six prompts of 3 to 13 tokens, eight completions of each.
REQUESTS = [Request(Prompt(i, "", "", [5] * (3 + 2 * i)), list(range(8))) for i in range(6)]


def test_the_budget_keeps_room_for_one_prompt_and_one_completion_or_says_what_to_raise() -> None:
    sequence_tokens = head_tokens(13) + LIMIT
    smallest = Budget.of(REQUESTS, LIMIT, 512, 13 + sequence_tokens)
    assert smallest.prompts == 1
    assert smallest.shape(sequence_tokens).sequences == 1
    with pytest.raises(
        UserError, match=rf"kv_cache_gb holds {12 + sequence_tokens} tokens.*prompt of 13.*completion of 96"
    ):
        Budget.of(REQUESTS, LIMIT, 512, 12 + sequence_tokens)


@pytest.mark.parametrize("tokens", range(150, 1500, 97))
def test_no_shape_exceeds_the_budget(tokens: int) -> None:
    budget = Budget.of(REQUESTS, LIMIT, 512, tokens)
    shape = budget.first_shape()
    while shape.sequence_tokens < budget.sequence_tokens:
        assert 0 < shape.sequences <= 48
        assert shape.tokens() <= tokens
        shape = budget.longer(shape)
    assert 0 < shape.sequences <= 48
    assert shape.tokens() <= tokens
