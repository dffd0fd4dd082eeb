"""A step that learns from a teacher: the gradient of the definition, alone and beside rewards, however it is split;
what has no reward's signal has a teacher's."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.tiny import write_tiny_model
from grpo.config import Recipe
from grpo.losses import divergence_of
from grpo.model.policy import Policy
from grpo.model.teacher import load_teacher
from grpo.packing import to_sequences
from grpo.run.run import Run
from grpo.types import Completion, Group, Prompt, Status, TeacherSays, TrainedSequence, VersionSpan
from grpo.update.step import optimizer_step
from tests.conftest import make_policy
from tests.gradient_of_step import TEMPERATURE, recipe_for, sequences
from tests.update.test_step import distance

COEF = 0.7
Gradient = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_tiny_model(folder, seed=5)
    return folder


def recipe_with(student: Path, size: int, *, temperature: float = TEMPERATURE, **of_teacher: Any) -> Recipe:
    values = recipe_for(str(student), "dapo", size, 0.0).model_dump()
    values["rollout"]["temperature"] = temperature
    return Recipe.model_validate(values | {"teacher": {"coef": COEF} | of_teacher})


@pytest.fixture(scope="module")
def policy(tiny_model: Path, teacher: Path) -> Policy:
    made = make_policy(tiny_model)
    load_teacher(recipe_with(tiny_model, 1, name=str(teacher), dtype="float32"), made)
    made.max_grad_norm = 0.0
    return made


def step_of(policy: Policy, recipe: Recipe, batch: list[TrainedSequence]) -> tuple[Gradient, dict[str, float]]:
    """Gradients of one optimizer step, which is intercepted, and its metrics."""
    found: Gradient = {}

    def capture(_: float) -> None:
        found.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
        policy.optimizer.zero_grad(set_to_none=True)

    policy.step = capture  # type: ignore[method-assign]
    return found, optimizer_step(Run(recipe, policy, Path("unused")), batch, 1.0)


def by_definition(student: Path, teacher: Path, batch: list[TrainedSequence], kind: str, *, rewards: bool) -> Gradient:
    """Sequence by sequence through both models' logits: mean over valid tokens of -A ratio and of the divergence."""
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (student, teacher)]
    valid = [s for s in batch if s.valid]
    tokens, total = sum(len(s.completion_ids) for s in valid), torch.zeros(())
    for s in valid:
        ids, at = torch.tensor([[*s.prompt_ids, *s.completion_ids]]), slice(len(s.prompt_ids) - 1, -1)
        log_q, log_p = ((lm(input_ids=ids).logits[0, at] / TEMPERATURE).log_softmax(-1) for lm in models)
        total = total + COEF * divergence_of(log_q, log_p.detach(), kind=kind).sum()
        if rewards:
            logps = log_q.gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0]
            ratio = (logps - torch.tensor(s.old_logprobs)).exp()
            total = total - torch.minimum(ratio * s.advantage, ratio.clamp(1 - 5.0, 1 + 5.0) * s.advantage).sum()
    (total / tokens).backward()
    return {f"causal_lm.{name}": p.grad for name, p in models[0].named_parameters()}


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_it_is_the_gradient_of_the_definition_in_any_micro_batches(
    policy: Policy, tiny_model: Path, teacher: Path, kind: str
) -> None:
    expected = by_definition(tiny_model, teacher, sequences(), kind, rewards=True)
    for size in (8, 1):
        recipe = recipe_with(tiny_model, size, name=str(teacher), dtype="float32", divergence=kind)
        found, metrics = step_of(policy, recipe, sequences())
        assert distance(expected, found) < 1e-5, size
        assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + COEF * metrics["teacher/kl"], rel=1e-5)
        assert metrics["teacher/kl"] > 0


def test_a_step_without_any_reward_s_signal_learns_from_the_teacher(
    policy: Policy, tiny_model: Path, teacher: Path
) -> None:
    flat = sequences()
    for s in flat:
        s.advantage = 0.0
    expected = by_definition(tiny_model, teacher, flat, "reverse_kl", rewards=False)
    found, metrics = step_of(policy, recipe_with(tiny_model, 3, name=str(teacher), dtype="float32"), flat)
    assert distance(expected, found) < 1e-5
    assert metrics["policy_loss"] == 0.0


def test_of_a_server_s_log_probabilities_it_is_the_policy_gradient(policy: Policy, tiny_model: Path) -> None:
    """Of (log q - log p) sg, over the tokens; invalid sequences take no part in it, and their tokens do not count."""
    draw, batch = random.Random(1), sequences()
    for s in batch:
        s.advantage, s.old_logprobs = 0.0, None
        s.teacher = TeacherSays([draw.uniform(-9, -1) for _ in s.completion_ids])
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    valid = [s for s in batch if s.valid]
    total, differences = torch.zeros(()), []
    for s in valid:
        ids, at = torch.tensor([[*s.prompt_ids, *s.completion_ids]]), slice(len(s.prompt_ids) - 1, -1)
        logps = lm(input_ids=ids).logits[0, at].log_softmax(-1)
        logps = logps.gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0]
        difference = logps.detach() - torch.tensor(s.teacher.logprobs)
        total = total + COEF * (difference * logps).sum()
        differences += difference.tolist()
    (total / len(differences)).backward()
    expected = {f"causal_lm.{name}": p.grad for name, p in lm.named_parameters()}
    for size in (8, 1):
        recipe = recipe_with(tiny_model, size, temperature=1.0, url="http://127.0.0.1:9")
        found, metrics = step_of(policy, recipe, batch)
        assert distance(expected, found) < 1e-5, size
        assert metrics["teacher/kl"] == pytest.approx(np.mean(differences), rel=1e-4)


def test_what_no_reward_could_score_is_learned_from_where_rewards_are_not() -> None:
    completion = Completion([1, 2], [-1.0, -1.0], Status.STOP, "", [VersionSpan(0, 2, 0)])
    broken = Completion([], [], Status.ERROR, "", [])
    group = Group(Prompt(0, "", "", [3]), [completion, broken], [None, None])
    group.teacher = [TeacherSays([-1.0, -2.0]), TeacherSays()]
    algorithm = recipe_for("x", "dapo", 1, 0.0).algorithm
    made = to_sequences([group], np.zeros((1, 2)), algorithm, scored=False)
    assert [s.valid for s in made] == [True, False]
    assert made[0].teacher == group.teacher[0]
    assert [s.valid for s in to_sequences([group], np.zeros((1, 2)), algorithm)] == [False, False]
