"""Completions of an older policy: how old they may be, and what the update makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.errors import RunError
from grpo.metrics import staleness_metrics
from grpo.model.policy import Policy
from grpo.run.run import Run
from grpo.types import Completion, Group, Prompt, Status, VersionSpan
from grpo.update.step import update
from tests.conftest import make_policy, make_recipe

STALE = {"backend": "vllm", "num_generations": 2, "max_staleness": 2}


def group(*spans: VersionSpan, replayed: bool = False) -> Group:
    completions = [Completion([5, 7], [-2.0, -3.0], Status.STOP, "", list(spans)) for _ in range(2)]
    return Group(Prompt(3, "q", "q", [3, 3]), completions, [1.0, 0.0], {"f": [1.0, 0.0]}, replayed=replayed)


def run_of(policy: Any, step: int, **sections: Any) -> Run:
    training = {"output_dir": "unused", "prompts_per_step": 2}
    recipe = make_recipe(Path("tiny"), **{"rollout": STALE, "training": training, **sections})
    run = Run(recipe, policy, Path("unused"))
    run.progress.step = step
    return run


@pytest.mark.parametrize(("version", "step"), [(4, 7), (8, 7), (0, 3)])
def test_a_token_that_is_staler_than_allowed_is_an_error_that_names_both_versions(version: int, step: int) -> None:
    """Also where the other tokens of its completion are not, and where it is of a later policy than is trained."""
    stale = group(VersionSpan(0, 1, version), VersionSpan(1, 2, step))
    says = f"policy version {version}, and version {step} is trained; rollout.max_staleness is 2"
    with pytest.raises(RunError, match=f"^prompt 3: tokens 0 to 1 of a completion are of {says}$"):
        update(run_of(None, step), [group(VersionSpan(0, 2, step)), stale], np.zeros((2, 2)), 0.1)


def test_what_is_as_stale_as_allowed_is_trained_on_and_replayed_groups_are_older_by_the_recipes_wish() -> None:
    groups = [group(VersionSpan(0, 1, 5), VersionSpan(1, 2, 7)), group(VersionSpan(0, 2, 0), replayed=True)]
    with pytest.raises(AttributeError):  # it has passed the check, and wants a policy
        update(run_of(None, 7), groups, np.ones((2, 2)), 0.1)


def test_staleness_is_counted_in_tokens() -> None:
    groups = [group(VersionSpan(0, 2, 7)), group(VersionSpan(0, 1, 5), VersionSpan(1, 2, 6)), group()]
    assert staleness_metrics(groups, 7) == {"sampling/staleness/mean": 0.75, "sampling/staleness/max": 2.0}
    assert staleness_metrics([group()], 7) == {}


def gradients(policy: Policy, run: Run, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Those of the optimizer steps made of the groups, whose first completions are right. Nothing is stepped."""
    found: list[torch.Tensor] = []

    def instead_of_step(rate: float) -> None:
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
        policy.optimizer.zero_grad(set_to_none=True)

    monkeypatch.setattr(policy, "step", instead_of_step)
    update(run, groups, np.array([[1.0, -1.0]] * len(groups)), 0.1)
    return found


@pytest.mark.parametrize("minibatches", [1, 2])
def test_stale_tokens_have_the_weight_of_their_ratio_and_no_clip_around_their_sampler(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, minibatches: int
) -> None:
    """One token each: the gradient is the sum of A min(pi / mu, 3) grad log pi, also where pi / mu is outside of the
    clip range. A replayed group's clip range is around the policy that sampled it: outside there is no gradient."""
    sections: dict[str, Any] = {
        "rollout": STALE,
        "algorithm": {"loss_type": "grpo", "num_minibatches": minibatches},
        "optimizer": {"max_grad_norm": 0},
    }
    policy = make_policy(tiny_model, **sections)
    gained = {(1, 5): 0.5, (1, 9): -0.4, (2, 11): 2.0, (2, 13): 0.0}  # log(pi / mu)

    def logp(row: int, token: int) -> torch.Tensor:
        with torch.enable_grad():
            logits = policy.causal_lm(input_ids=torch.tensor([[row, row]])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1)[token]

    def made(row: int, *, replayed: bool = False) -> Group:
        completions = [
            Completion([t], [float(logp(r, t).detach()) - gain], Status.STOP, "", [VersionSpan(0, 1, 5)])
            for (r, t), gain in gained.items()
            if r == row
        ]
        return Group(Prompt(row, "", "", [row, row]), completions, [1.0, 0.0], {"f": [1.0, 0.0]}, replayed=replayed)

    def by_hand(row: int, weights: tuple[float, float]) -> torch.Tensor:
        tokens = [t for r, t in gained if r == row]
        total = sum(-sign * w * logp(row, t) for sign, w, t in zip((1.0, -1.0), weights, tokens, strict=True))
        total.backward()  # type: ignore[union-attr]
        found = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        policy.optimizer.zero_grad(set_to_none=True)
        return found

    run = run_of(policy, 7, **sections)
    found = gradients(policy, run, [made(1), made(2)], monkeypatch)
    of_groups = [by_hand(1, (np.exp(0.5), np.exp(-0.4))), by_hand(2, (3.0, 1.0))]
    expected = [sum(of_groups) / 4] if minibatches == 1 else [g / 2 for g in of_groups]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)

    clipped = gradients(policy, run, [made(1, replayed=True), made(2, replayed=True)], monkeypatch)
    inside = [by_hand(1, (0.0, 0.0)), by_hand(2, (0.0, 1.0))]  # 1.65 and 7.4 gained and right, 0.67 lost and wrong
    expected = [sum(inside) / 4] if minibatches == 1 else [g / 2 for g in inside]
    for ours, theirs in zip(clipped, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
