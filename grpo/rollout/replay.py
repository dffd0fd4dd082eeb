"""Groups with a signal that a run keeps from earlier steps, for steps that find too few; a checkpoint holds them.

A replayed group is off-policy: the update weighs each token by the ratio of the policy's probability to that of the
policy which sampled it, and clips that ratio as any other. A group is replayed once at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from grpo.run.exchange import pack, pack_prompt, unpack, unpack_prompt
from grpo.types import Group

if TYPE_CHECKING:
    from grpo.prompts.task import Task

SavedGroup = dict[str, Any]
"""A group in a checkpoint: ``prompt_id``, ``used`` (its prompt, where an environment made it), ``completions``
(packed), ``rewards`` and ``rewards_by_function``."""


def restored(task: Task, saved: Sequence[SavedGroup]) -> list[Group]:
    """The groups that were saved, oldest first."""
    return [
        Group(
            unpack_prompt(task.prompt(task.train, values["prompt_id"]), values.get("used")),
            unpack(values["completions"]),
            values["rewards"],
            values["rewards_by_function"],
            replayed=True,
        )
        for values in saved
    ]


def remembered(saved: list[SavedGroup], *, used: int, groups: Sequence[Group], most: int) -> list[SavedGroup]:
    """What to keep after a step that used the ``used`` newest groups of ``saved`` and sampled ``groups`` with a signal:
    the newest ``most`` groups."""
    if most == 0:
        return []
    new = [
        {
            "prompt_id": group.prompt.id,
            "used": pack_prompt(group),
            "completions": pack(group.completions),
            "rewards": group.rewards,
            "rewards_by_function": group.rewards_by_function,
        }
        for group in groups[-most:]
    ]
    return (saved[: len(saved) - used] + new)[-most:]
