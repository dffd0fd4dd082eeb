"""What one process does for all, and what each does for itself, so that none waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from grpo.errors import RunError, UserError

T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run ``work`` on the first process and give its result, or its UserError or RunError, to every process. Another
    error is raised there, and as a RunError on the others, which would wait otherwise."""
    outcome: list[Any] = [None, None]
    failed: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome = [work(), None]
        except (UserError, RunError) as error:
            outcome = [None, error]
        except Exception as error:
            failed = error
            outcome = [None, RunError(f"the first process failed: {type(error).__name__}: {error}")]
    broadcast_object_list(outcome)
    if failed is not None:
        raise failed
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_each(work: Callable[[], T]) -> list[T]:
    """The results of ``work`` on every process, by rank, on all of them.

    Raises:
        RunError: it failed on one; on every process, with the first such rank.
    """
    try:
        mine: tuple[Any, str | None] = (work(), None)
    except Exception as error:
        mine = (None, f"{type(error).__name__}: {error}")
    found = gather_object([mine])
    for rank, (_, failure) in enumerate(found):
        if failure is not None:
            raise RunError(f"rank {rank}: {failure}")
    return [value for value, _ in found]
