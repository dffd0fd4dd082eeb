"""A user's own loss: checked when it is loaded, and its functions' results at every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch

from grpo import user_code
from grpo.config import AlgorithmConfig
from grpo.errors import UserError
from grpo.losses.tokens import Counts, LossType, StepTokens, Tokens

LEVELS = ("token", "sequence", "sequence_token")


def checked(found: Any, place: str) -> LossType:
    """The loss type, with functions that check their results: UserError at a wrong first one, RunError later.

    Raises:
        UserError: ``found`` is no loss, or one of its functions takes other arguments.
    """
    what = f"algorithm.loss_type: {place}"
    if not isinstance(found, LossType):
        is_ = "is not decorated by" if callable(found) else f"is {user_code.brief(found)}; expected a function under"
        raise UserError(f"{what} {is_} @loss(reduce=..., denominator=...) of grpo.losses")
    if found.level not in LEVELS:
        raise UserError(f"{what}: level must be {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {found.level!r}")
    user_code.must_take(found.objective, ("tokens", "options"), what)
    user_code.must_take(found.reduce, ("loss_BT", "mask_BT"), f"{what}: reduce")
    user_code.must_take(found.denominator, ("counts",), f"{what}: denominator")
    user_code.must_take(found.measure, ("tokens", "options"), f"{what}: measure")
    if found.select is not None:
        user_code.must_take(found.select, ("step", "options", "generator"), f"{what}: select")
    calls = user_code.Calls(what)
    return replace(
        found,
        objective=_watched(found.objective, calls, lambda loss_BT, tokens, _: _wrong(loss_BT, tokens, calls.first)),
        reduce=_watched(found.reduce, user_code.Calls(f"{what}: reduce"), _wrong_sum),
        denominator=_watched(found.denominator, user_code.Calls(f"{what}: denominator"), _wrong_denominator),
        measure=_under_own_prefix(_watched(found.measure, user_code.Calls(f"{what}: measure"), _wrong_measures)),
        select=found.select and _watched(found.select, user_code.Calls(f"{what}: select"), _wrong_selection),
    )


def _watched(
    function: Callable[..., Any], calls: user_code.Calls, problem_with: Callable[..., str | None]
) -> Callable[..., Any]:
    """``function``, which now raises what ``problem_with(result, *arguments)`` finds wrong, if anything."""

    @wraps(function)
    def watched(*arguments: Any) -> Any:
        with calls.call():
            result = function(*arguments)
            if problem := problem_with(result, *arguments):
                raise calls.error(problem)
        return result

    return watched


def _under_own_prefix(measure: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., dict[str, torch.Tensor]]:
    """``measure``, whose metrics are now called ``loss/…``: one of them called ``kl`` must not pass for the trainer's.
    Functions of ours keep their names."""
    if inspect.unwrap(measure).__module__.startswith("grpo."):
        return measure
    return lambda *arguments: {f"loss/{name}": total for name, total in measure(*arguments).items()}


def _wrong(loss_BT: Any, tokens: Tokens, first: bool) -> str | None:
    """What is wrong with an objective's result."""
    expected = f"expected a floating-point tensor of shape (B,T), here {tuple(tokens.mask_BT.shape)}"
    if not isinstance(loss_BT, torch.Tensor) or loss_BT.shape != tokens.mask_BT.shape:
        sums = isinstance(loss_BT, torch.Tensor) and loss_BT.ndim == 0
        return f"it returned {_kind(loss_BT)}; {expected}" + ("; reduce sums it up" if sums else "")
    if not loss_BT.is_floating_point():
        return f"it returned a tensor of {loss_BT.dtype}; {expected}"
    if tokens.logps_BT.requires_grad and not loss_BT.requires_grad:
        return "it returned a tensor without gradient; compute it from logps_BT, log_ratio_BT or ratio_BT, not detached"
    if first and not loss_BT.isfinite().all():  # waits for a GPU; later the step's loss and gradient norm show it
        count = int((~loss_BT.isfinite()).sum())
        return (
            f"it returned nan or inf at {count} of {loss_BT.numel()} positions; expected finite numbers, and where "
            "the mask is 0 too: what it is given is finite there"
        )
    return None


def _wrong_sum(total: Any, loss_BT: torch.Tensor, mask_BT: torch.Tensor) -> str | None:
    if isinstance(total, torch.Tensor) and total.ndim == 0:
        return None
    return f"it returned {_kind(total)}; expected a tensor of one number, the sum over the micro-batch"


def _wrong_denominator(number: Any, counts: Counts) -> str | None:
    if isinstance(number, (int, float)):
        return None
    return f"it returned {_kind(number)}; expected a number, such as counts.tokens"


def _wrong_measures(sums: Any, tokens: Tokens, options: AlgorithmConfig) -> str | None:
    if isinstance(sums, dict) and all(isinstance(v, torch.Tensor) and v.ndim == 0 for v in sums.values()):
        return None
    return f"it returned {_kind(sums)}; expected a dict of tensors of one number each"


def _wrong_selection(kept_M: Any, step: StepTokens, options: AlgorithmConfig, generator: torch.Generator) -> str | None:
    if isinstance(kept_M, torch.Tensor) and kept_M.shape == step.logps_M.shape:
        return None
    tokens = step.logps_M.numel()
    return f"it returned {_kind(kept_M)}; expected a tensor of 1 or 0 for each of the step's tokens, here {tokens}"


def _kind(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else user_code.brief(value)
