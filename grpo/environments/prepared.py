"""A recipe ready to be sampled from: tokenizer, task and environment, whose tools the prompts show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from grpo.config import Recipe
from grpo.environments.episodes import Episodes, open_episodes
from grpo.prompts.task import Task
from grpo.run.session import prepare_task, prepare_tokenizer


class Prepared(NamedTuple):
    """``stop_ids`` are the token ids that end a completion; ``episodes`` is None without an environment."""

    tokenizer: Any
    stop_ids: list[int]
    task: Task
    episodes: Episodes | None


@contextmanager
def prepared(recipe: Recipe) -> Iterator[Prepared]:
    """What ``prepare_task`` gives, and the recipe's environment for as long as the block lasts. Raises UserError."""
    tokenizer, stop_ids = prepare_tokenizer(recipe)
    with open_episodes(recipe, tokenizer, stop_ids) as episodes:
        tools = episodes.tools if episodes is not None else []
        _, _, task = prepare_task(recipe, tokenizer, tools)
        if episodes is not None:
            episodes.check_columns(task.columns)
        yield Prepared(tokenizer, stop_ids, task, episodes)
