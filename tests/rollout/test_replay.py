"""Replayed groups: which are kept, that each is used once, and that the update takes the ratio to who sampled them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.model.policy import Policy
from grpo.rollout.replay import remembered, restored
from grpo.run.run import Run
from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn, VersionSpan
from grpo.update.step import update
from tests.conftest import make_policy, make_recipe
from tests.small_runs import lines, progress, small_run


class FakeTask:
    train = None

    def prompt(self, part: Any, row: int) -> Prompt:
        return Prompt(row, f"q{row}", f"q{row}", [row, row])


def group(row: int, version: int = 0, *, replayed: bool = False, logprobs: tuple[float, ...] = (-2.0, -3.0)) -> Group:
    completions = [
        Completion([5 + g, 7], list(logprobs), Status.STOP, f"{row}.{g}", [VersionSpan(0, 2, version)])
        for g in range(2)
    ]
    task = FakeTask()
    return Group(task.prompt(None, row), completions, [1.0, 0.0], {"f": [1.0, 0.0]}, replayed=replayed)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def ids(rows: list[dict[str, Any]]) -> list[int]:
    return [row["prompt_id"] for row in rows]


def test_the_newest_are_kept_and_those_used_leave() -> None:
    rows = remembered([], used=0, groups=[group(i) for i in range(3)], most=4)
    assert ids(rows) == [0, 1, 2]
    rows = remembered(rows, used=0, groups=[group(3), group(4)], most=4)
    assert ids(rows) == [1, 2, 3, 4]
    rows = remembered(rows, used=2, groups=[group(5)], most=4)
    assert ids(rows) == [1, 2, 5]
    assert ids(remembered(rows, used=3, groups=[], most=4)) == []
    assert remembered([], used=0, groups=[group(1)], most=0) == []


def test_groups_come_back_whole_from_a_checkpoint_and_marked() -> None:
    task: Any = FakeTask()
    groups = [group(3, version=7), group(4, version=8)]
    rows = through_a_file(remembered([], used=0, groups=groups, most=9))
    found = restored(task, rows)
    for back in found:
        for c in back.completions:
            c.token_ids, c.sampler_logprobs = list(c.token_ids), list(c.sampler_logprobs)
    assert found == [replace(g, replayed=True) for g in groups]


def gradient(policy: Policy, recipe: Any, groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The gradient that one update makes of these groups, the first completion of each right."""
    found: list[torch.Tensor] = []

    def instead_of_step(rate: float) -> None:
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
        policy.optimizer.zero_grad(set_to_none=True)

    monkeypatch.setattr(policy, "step", instead_of_step)
    update(Run(recipe, policy, Path("unused")), groups, np.array([[1.0, -1.0]] * len(groups)), 0.1)
    return found[0]


def test_episodes_come_back_with_the_prompts_that_were_used() -> None:
    task: Any = FakeTask()
    made = group(3, version=7)
    made.prompt = replace(made.prompt, prompt="as used", text="as used", token_ids=[3, 3, 9], prefill="<think>")
    for completion in made.completions:
        completion.episode = Episode([Turn(0, 1, "tool_call", 0.5, (ToolCall("add", "{}", "3"),))], 1.0)
    (back,) = restored(task, through_a_file(remembered([], used=0, groups=[made], most=9)))
    assert back.prompt == made.prompt
    assert [c.episode for c in back.completions] == [c.episode for c in made.completions]


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_update_weighs_replayed_tokens_by_their_ratio(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    """One token each: the gradient is the sum over completions of A * ratio * grad log pi, where no clip binds.

    Fresh groups have ratio 1 whatever the sampler said; replayed ones pi / mu of the logprobs that they carry."""
    sections: dict[str, Any] = {
        "rollout": {"num_generations": 2},
        "algorithm": {"loss_type": "grpo", "beta": beta, "epsilon": 0.9, "epsilon_high": 0.9},
        "optimizer": {"max_grad_norm": 0},
        "training": {"output_dir": "unused", "prompts_per_step": 2},
    }
    recipe = make_recipe(tiny_model, **sections)
    policy = make_policy(tiny_model, needs_reference=beta > 0, **sections)

    def one_token(row: int, token: int, logprob: float) -> Completion:
        return Completion([token], [logprob], Status.STOP, "", [VersionSpan(0, 1, 0)])

    def logp(row: int, token: int) -> torch.Tensor:
        with torch.enable_grad():
            logits = policy.causal_lm(input_ids=torch.tensor([[row, row]])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1)[token]

    tokens = {1: (5, 9), 2: (11, 13)}
    shift = {1: 0.0, 2: 0.3}  # what the policy has gained since the replayed group was sampled
    groups = [
        Group(
            Prompt(row, "", "", [row, row]),
            [one_token(row, t, float(logp(row, t).detach()) - shift[row]) for t in tokens[row]],
            [1.0, 0.0],
            {"f": [1.0, 0.0]},
            replayed=row == 2,
        )
        for row in (1, 2)
    ]
    expected = torch.zeros(())
    for row, pair in tokens.items():
        for sign, token in zip((1.0, -1.0), pair, strict=True):
            expected = expected - sign * torch.exp(logp(row, token) - logp(row, token).detach() + shift[row]) / 4
    expected.backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.optimizer.zero_grad(set_to_none=True)
    ours = gradient(policy, recipe, groups, monkeypatch)
    torch.testing.assert_close(ours, by_hand, atol=1e-6, rtol=1e-4)  # the KL penalty to itself has no gradient
    groups[1].replayed = False
    assert not torch.allclose(gradient(policy, recipe, groups, monkeypatch), by_hand, atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_a_run_replays_where_it_is_short_and_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_run(tiny_model, tmp_path / "whole", monkeypatch, prompts={"replay_groups": 2}, steps=8)
    rows = lines(tmp_path / "whole")
    assert sum(row["dynamic_sampling/groups_replayed"] for row in rows) > 0
    held = 0
    for row in rows:
        kept, used = row["dynamic_sampling/groups_kept"], row["dynamic_sampling/groups_replayed"]
        assert used == min(held, 4 - kept), "as many as are missing, or as there are"
        assert kept + used + row["dynamic_sampling/groups_without_signal"] == 4
        held = min(2, held - used + kept)
    assert len(progress(tmp_path / "whole", 8)["replay"]) == held
