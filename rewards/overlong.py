"""Overlong: DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13), from 0 to -1 over the last tokens before L_max.

It never pays, so add it to a reward for the answer. Without it a truncated completion is worth as much as a wrong one,
and nothing says that another was nearly too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.length import soft_overlong_punishment
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "shaping"


def verify(length: int, *, max_completion_length: int, soft_punish_cache: int, status: str | None = "stop") -> Verdict:
    """Judge a completion of ``length`` tokens, its end-of-sequence token included.

    One cut off (``status`` ``"length"``) is punished in full whatever its length, because L_max may be above the
    rollout's own limit. One that ended in ``"error"`` has no reward.
    """
    score = soft_overlong_punishment(length, max_completion_length, soft_punish_cache)
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED, f"cut off after {length} tokens", -1.0)
    if score == 0:
        return Verdict(Outcome.CORRECT, score=0.0)
    return Verdict(Outcome.WRONG, f"{length} tokens, over {max_completion_length} - {soft_punish_cache}", score)


def overlong_reward(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    status: list[str] | None = None,
    *,
    max_completion_length: int,
    soft_punish_cache: int,
    **kwargs: Any,
) -> list[float | None]:
    """0 up to ``max_completion_length - soft_punish_cache`` tokens, -1 at ``max_completion_length`` or where cut off.

    TRL's signature: lists with one entry a completion. DAPO's own values are 20480 and 4096.
    """
    statuses: Sequence[str | None] = status or [None] * len(completion_ids)
    verdicts = [
        verify(
            len(ids),
            max_completion_length=max_completion_length,
            soft_punish_cache=soft_punish_cache,
            status=status_i,
        )
        for ids, status_i in zip(completion_ids, statuses, strict=True)
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))
