"""Cosine: what a right or wrong answer is worth changes with its length (Demystifying Long CoT, arXiv:2502.03373).

A right answer is worth more the shorter it is, a wrong one less. So the policy is pushed to think longer while it
fails, and to be brief once it succeeds. With L the length in tokens and CosFn a half cosine,

    right      CosFn(L) from max_value_correct (L = 0) to min_value_correct (L = max_completion_length)
    wrong      CosFn(L) from min_value_wrong to max_value_wrong
    cut off    value_truncated: the paper's r_e; by default min_value_wrong, the worst

It replaces the reward of the verifier it names; with both, the answer counts twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from rewards.length import cosine_between, ran_out
from rewards.verdict import UNSCORABLE, Outcome, Verdict, rewards_of

JUDGES = "answer"


class UnknownVerifier(RuntimeError):
    """``verifier`` names no built-in reward that could say what is right."""


def score(
    correct: bool,
    length: int,
    *,
    max_completion_length: int,
    status: str | None = "stop",
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    value_truncated: float | None = None,
) -> float:
    """The reward of a right or wrong completion of ``length`` tokens, its end-of-sequence token included.

    A completion longer than ``max_completion_length`` counts as cut off.

    Raises:
        ValueError: a wrong or unfinished answer could be worth as much as a right one, or a range is upside down.
    """
    cut_off = min_value_wrong if value_truncated is None else value_truncated
    if max_completion_length < 1:
        raise ValueError(f"max_completion_length must be at least 1, got {max_completion_length}")
    if not min_value_wrong <= max_value_wrong < min_value_correct <= max_value_correct or cut_off > max_value_wrong:
        raise ValueError(
            "need min_value_wrong <= max_value_wrong < min_value_correct <= max_value_correct, and value_truncated <= "
            f"max_value_wrong, got {min_value_wrong}, {max_value_wrong}, {min_value_correct}, {max_value_correct} and "
            f"{cut_off}"
        )
    if ran_out(length, max_completion_length, status):
        return cut_off
    if correct:
        return cosine_between(length, max_completion_length, max_value_correct, min_value_correct)
    return cosine_between(length, max_completion_length, min_value_wrong, max_value_wrong)


def cosine_reward(
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    status: list[str] | None = None,
    *,
    verifier: str,
    verifier_args: dict[str, Any] | None = None,
    max_completion_length: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    value_truncated: float | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """The cosine length reward; ``verifier`` names the built-in that says what is right (``countdown``, ``math``, …).

    The verifier gets this function's arguments and ``verifier_args``. A completion that it pays 1 is right; one that it
    cannot score has no reward here either. TRL's signature: lists with one entry a completion.
    """
    told: list[Verdict] = []
    statuses: Sequence[str | None] = status or [None] * len(completion_ids)
    if status is not None:
        kwargs["status"] = status
    arguments = {**kwargs, **(verifier_args or {}), "completion_ids": completion_ids, "log_verdict": told.extend}
    values = _function(verifier)(prompts=prompts, completions=completions, **arguments)
    verdicts = []
    for value, verdict, ids, status_i in zip(values, told, completion_ids, statuses, strict=True):
        if value is None:
            verdicts.append(verdict if verdict.outcome in UNSCORABLE else Verdict(Outcome.ERROR, verdict.detail))
            continue
        shaped = score(
            value >= 1,
            len(ids),
            max_completion_length=max_completion_length,
            status=status_i,
            min_value_wrong=min_value_wrong,
            max_value_wrong=max_value_wrong,
            min_value_correct=min_value_correct,
            max_value_correct=max_value_correct,
            value_truncated=value_truncated,
        )
        verdicts.append(Verdict(verdict.outcome, verdict.detail, shaped))
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def check_row(row: dict[str, Any], *, verifier: str = "") -> str | None:
    """Why no completion could be right for this row, as the verifier says, or None."""
    check = getattr(_module(verifier), "check_row", None)
    return check(row) if check is not None else None


def start(workers: int | None = None, *, verifier: str = "", verifier_args: dict[str, Any] | None = None) -> None:
    """Start the verifier's own workers, if it has any. A trainer does it early."""
    module = _module(verifier)
    if hasattr(module, "start"):
        accepted = inspect.signature(module.start).parameters
        module.start(workers, **{key: value for key, value in (verifier_args or {}).items() if key in accepted})
        _started.append(module)


def stop() -> None:
    """End the workers that ``start`` started."""
    while _started:
        _started.pop().stop()


_started: list[ModuleType] = []


def _module(verifier: str) -> ModuleType:
    name = f"rewards.{verifier}"
    if not verifier.isidentifier() or name == __name__ or find_spec(name) is None:
        raise UnknownVerifier(f"args.verifier must name the built-in reward that says what is right, got {verifier!r}")
    module = import_module(name)
    if not hasattr(module, f"{verifier}_reward"):
        raise UnknownVerifier(f"args.verifier: {name} has no {verifier}_reward")
    return module


def _function(verifier: str) -> Any:
    return getattr(_module(verifier), f"{verifier}_reward")
