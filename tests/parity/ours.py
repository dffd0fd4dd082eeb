"""Ours on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grpo.config import AlgorithmConfig
from grpo.losses import (
    Counts,
    StepTokens,
    entropy_bonus,
    find_loss,
    importance_weights,
    top_entropy_kept,
)
from tests.losses.calling import policy_loss
from tests.parity.cases import MAX_LENGTH, WINDOW, Case, Problem, tensors

Loss = Callable[[Problem, torch.Tensor, torch.Tensor], torch.Tensor]


def posed(case: Case, seed: int = 0) -> Problem:
    """The case on random tensors, with our weights and our selection of tokens."""
    x = tensors(seed)
    weights = None
    if case.mode:
        given = x["old_logps_BT"], x["sampler_logps_BT"], x["mask_BT"]
        weights = importance_weights(*given, mode=case.mode, **WINDOW)
    return Problem(case, x, weights, selection(case, x, seed))


def selection(case: Case, x: dict[str, torch.Tensor], seed: int) -> torch.Tensor | None:
    here_BT = x["mask_BT"] > 0
    select = find_loss(case.options.get("loss_type", "dapo")).select
    if case.top_entropy < 1:
        kept_M = top_entropy_kept(x["entropies_BT"][here_BT], case.top_entropy)
    elif select is not None:
        numbers = {key: value for key, value in case.options.items() if key in AlgorithmConfig.model_fields}
        advantages_BT = x["advantages_B"][:, None].expand_as(here_BT)
        ratio_BT = x["logps_BT"] - x["old_logps_BT"]
        step = StepTokens(*(v[here_BT] for v in (x["logps_BT"], ratio_BT, x["entropies_BT"], advantages_BT)))
        kept_M = select(step, AlgorithmConfig.model_construct(**numbers), torch.Generator().manual_seed(seed))
    else:
        return None
    return torch.ones_like(x["mask_BT"]).masked_scatter(here_BT, kept_M)


def our_loss(problem: Problem, logps_BT: torch.Tensor, entropies_BT: torch.Tensor) -> torch.Tensor:
    """The sum over micro-batches."""
    case, mask_BT = problem.case, problem.x["mask_BT"]
    kept = None if problem.kept_BT is None else int((problem.kept_BT * mask_BT).sum())
    counts = Counts(int(mask_BT.sum()), len(mask_BT), len(problem.rows), MAX_LENGTH, kept)
    total = torch.zeros((), dtype=torch.float64)
    for part in problem.micro_batches(logps_BT=logps_BT, entropies_BT=entropies_BT):
        loss, _ = policy_loss(
            part["logps_BT"],
            None if case.on_policy else part["old_logps_BT"],
            part["ref_logps_BT"],
            part["advantages_B"],
            part["mask_BT"],
            counts,
            weights_BT=part["weights"],
            kept_BT=part["kept_BT"],
            sampler_logps_BT=part["sampler_logps_BT"],
            **case.options,
        )
        if case.entropy_coef:
            bonus = entropy_bonus(part["entropies_BT"], part["mask_BT"], part["kept_BT"], counts)
            loss = loss - case.entropy_coef * bonus
        total = total + loss
    return total


def gradient_of(loss: Loss, problem: Problem) -> tuple[torch.Tensor, float]:
    """By log-probabilities, then by entropies, at the tokens that count; and the loss."""
    leaves = [problem.x[name].clone().requires_grad_() for name in ("logps_BT", "entropies_BT")]
    value = loss(problem, *leaves)
    value.backward()
    here_BT = problem.x["mask_BT"] > 0
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return torch.cat([grad[here_BT] for grad in grads]), float(value.detach())
