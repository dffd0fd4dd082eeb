"""What one process does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

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
