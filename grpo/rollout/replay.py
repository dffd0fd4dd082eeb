"""Groups with a signal that a run keeps from earlier steps, for those that are short of it: rows in the checkpoint.

A replayed group is off-policy: the update weighs its tokens by the policy's probability over that of the policy which
sampled them, and clips that ratio as any other. Each is replayed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo.prompts.task import Task
from grpo.rollout.rollouts import completion_of, row_of
from grpo.types import Group

Rows = list[dict[str, Any]]


def restored(task: Task, rows: Rows) -> list[Group]:
    """The groups of ``rows``, oldest first."""
    return [
        Group(
            task.prompt(task.train, row["prompt_id"]),
            [completion_of(completion) for completion in row["completions"]],
            row["rewards"],
            row["rewards_by_function"],
            replayed=True,
        )
        for row in rows
    ]


def remembered(rows: Rows, *, used: int, groups: Sequence[Group], most: int) -> Rows:
    """The rows after a step that used the ``used`` newest and sampled ``groups`` with a signal: the newest ``most``."""
    if most == 0:
        return []
    new = [
        {
            "prompt_id": group.prompt.id,
            "completions": [row_of(completion) for completion in group.completions],
            "rewards": group.rewards,
            "rewards_by_function": group.rewards_by_function,
        }
        for group in groups[-most:]
    ]
    return (rows[: len(rows) - used] + new)[-most:]
