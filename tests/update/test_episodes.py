"""An episode in the update: its environment's tokens are read, by model and teacher, and nothing of them counts."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import AlgorithmConfig, Recipe
from grpo.losses import LOSSES, Counts, policy_loss
from grpo.model.policy import Policy
from grpo.model.teacher import Teacher
from grpo.packing import to_sequences
from grpo.run.run import Run
from grpo.types import Completion, Episode, Group, Prompt, Status, TeacherSays, TrainedSequence, Turn, VersionSpan
from grpo.update.kl_in_reward import less_kl
from grpo.update.step import check_uncounted, optimizer_step, update
from tests.conftest import make_policy
from tests.gradient_of_step import TEMPERATURE, move, recipe_for
from tests.update.test_step import distance

BETA = 0.1
Gradient = dict[str, torch.Tensor]
Turns = list[tuple[int, int]]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    made = make_policy(tiny_model, needs_reference=True)
    move(made.reference)
    made.max_grad_norm = 0.0
    return made


def groups(size: int = 4) -> list[Group]:
    """Two groups of episodes of one to three turns; what an environment says stands before some of the first turns. One
    episode failed before its first turn."""
    draw, made = random.Random(0), []
    for number in range(2):
        completions = []
        for _ in range(size):
            ids, turns = [draw.randrange(10, 300) for _ in range(draw.choice((0, 3)))], []
            for _ in range(draw.randrange(1, 4)):
                start = len(ids)
                ids += [draw.randrange(10, 300) for _ in range(draw.randrange(1, 9))]
                turns.append((start, len(ids)))
                ids += [draw.randrange(10, 300) for _ in range(draw.randrange(1, 6))]
            completions.append(episode(ids[: turns[-1][1]], turns, [draw.uniform(-8, -4) for _ in ids]))
        prompt = [draw.randrange(10, 300) for _ in range(draw.randrange(3, 12))]
        rewards: list[float | None] = [draw.random() for _ in completions]
        made.append(Group(Prompt(number, "", "", prompt), completions, rewards))
    made[1].completions[2] = Completion([11, 12], [0.0, 0.0], Status.ERROR, "", [], Episode([], failure="crashed"))
    made[1].rewards[2] = None
    return made


def episode(ids: list[int], turns: Turns, logprobs: list[float]) -> Completion:
    said = Episode([Turn(start, end, "stop", reward=0.5 * place) for place, (start, end) in enumerate(turns)])
    return Completion(ids, logprobs[: len(ids)], Status.STOP, "", [VersionSpan(0, len(ids), 0)], said)


def sequences(*, old: bool = True, credit: str = "episode") -> list[TrainedSequence]:
    made, draw = groups(), np.random.default_rng(0)
    shape = (2, 4) if credit == "episode" else (2, 4, 3)
    found = to_sequences(made, draw.normal(size=shape), AlgorithmConfig())
    return [replace(s, old_logprobs=s.sampler_logprobs) if old else s for s in found]


def with_a_mask(made: list[TrainedSequence]) -> list[TrainedSequence]:
    """The same tokens as one completion, some of which do not count."""
    return [replace(s, environment=(), uncounted=s.environment) for s in made]


def step(policy: Policy, recipe: Recipe, made: list[TrainedSequence]) -> tuple[Gradient, dict[str, float]]:
    """Gradients of one optimizer step, which is intercepted, and its metrics."""
    found: Gradient = {}

    def capture(_: float) -> None:
        found.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
        policy.optimizer.zero_grad(set_to_none=True)

    policy.step = capture  # type: ignore[method-assign]
    return found, optimizer_step(Run(recipe, policy, Path("unused")), made, 1.0)


def recipe_of(model: Path, loss_type: str = "dapo", size: int = 8, beta: float = BETA, **algorithm: Any) -> Recipe:
    recipe = recipe_for(str(model), loss_type, size, beta)
    training = recipe.training.model_copy(update={"micro_batch_tokens": 4096})  # nothing to be measured
    algorithm = {"algorithm": recipe.algorithm.model_copy(update=algorithm)}
    return recipe.model_copy(update={"training": training, **algorithm})


@pytest.mark.parametrize("loss_type", LOSSES)
def test_its_gradient_is_that_of_the_same_tokens_as_one_completion_with_a_mask(
    policy: Policy, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str
) -> None:
    """In packed and in padded rows. Selections too: what does not count is not chosen from."""
    options = {"entropy_coef": 0.1, "off_policy_mask_threshold": 0.5, "importance_sampling_mode": "sequence_truncate"}
    recipe = recipe_of(tiny_model, loss_type, clip_cov_ratio=0.1, clip_cov_lb=0.0, kl_cov_ratio=0.1, **options)
    made, found = sequences(), []
    for packed, of_step in ((True, made), (False, made), (False, with_a_mask(made))):
        monkeypatch.setattr(policy, "packed", packed)
        found.append(step(policy, recipe, of_step))
    (packed_rows, metrics), (padded_rows, _), (masked, of_mask) = found
    assert distance(masked, packed_rows) < 1e-5
    assert distance(masked, padded_rows) < 1e-5
    assert metrics == pytest.approx(of_mask, rel=1e-4, abs=1e-6)
    assert ("kl" in metrics) == (loss_type not in ("rloo", "reinforce_pp"))  # there it is in the rewards


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_it_is_the_gradient_of_the_definition(
    policy: Policy, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str, packed: bool
) -> None:
    """Against autograd through transformers' own logits: one pass over the whole episode, in which the model's tokens
    alone are summed and counted."""
    monkeypatch.setattr(policy, "packed", packed)
    made = sequences()
    ours, _ = step(policy, recipe_of(tiny_model, loss_type, beta=0.0), made)
    valid = [s for s in made if s.valid]
    assert len(valid) == 7
    tokens = sum(len(s.completion_ids) - len(s.environment) for s in valid)
    total = torch.zeros(())
    for s in valid:
        ids = torch.tensor([[*s.prompt_ids, *s.completion_ids]])
        logits = policy.causal_lm(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / TEMPERATURE
        logps = logits.log_softmax(-1).gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0]
        own = [t for t in range(len(logps)) if t not in s.environment]
        ratio = (logps - torch.tensor(s.old_logprobs))[own].exp()
        loss = -torch.minimum(ratio * s.advantage, ratio.clamp(1 - 5.0, 1 + 5.0) * s.advantage)
        scale = {"grpo": 1 / (len(valid) * len(own)), "dr_grpo": 1 / (len(valid) * 40), "dapo": 1 / tokens}[loss_type]
        total = total + scale * loss.sum()
    total.backward()
    expected = {n: p.grad.clone() for n, p in policy.model.named_parameters()}
    policy.optimizer.zero_grad(set_to_none=True)
    assert distance(expected, ours) < 1e-5


@pytest.mark.parametrize("claimed", [-1e3, 3.0, float("nan"), float("-inf")])
def test_what_is_claimed_of_the_environments_tokens_moves_nothing(
    policy: Policy, tiny_model: Path, claimed: float
) -> None:
    """Neither the gradient nor a metric, to the bit; and they are no tokens that the sampler could say nothing of."""
    options = {"importance_sampling_mode": "sequence_truncate", "off_policy_mask_threshold": 0.5}
    recipe = recipe_of(tiny_model, **options)
    found = []
    for lie in (0.0, claimed):
        made = groups()
        for completion in (c for group in made for c in group.completions):
            for place in completion.environment_places():
                completion.sampler_logprobs[place] = lie  # type: ignore[index]
        of_step = to_sequences(made, np.linspace(-1, 1, 8).reshape(2, 4), recipe.algorithm)
        assert check_uncounted(of_step, 0) == {}
        found.append(step(policy, recipe, [replace(s, old_logprobs=s.sampler_logprobs) for s in of_step]))
    (ours, metrics), (lied, of_lie) = found
    assert all(torch.equal(ours[name], lied[name]) for name in ours)
    assert metrics == of_lie


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_has_no_gradient_at_the_environments_tokens(policy: Policy, loss_type: str) -> None:
    """Nor at the model's of an episode that failed."""
    batch = policy.collate(sequences(old=False))
    draw = torch.Generator().manual_seed(0)
    logps_BT = torch.randn(batch.mask_BT.shape, generator=draw).requires_grad_()
    counts = Counts(tokens=40, sequences=7, micro_batches=1, max_completion_length=40)
    batch = replace(batch, ref_logps_BT=torch.randn(batch.mask_BT.shape, generator=draw))
    loss, _ = policy_loss(logps_BT, batch, counts, AlgorithmConfig(loss_type=loss_type, beta=0.1))
    loss.backward()
    assert logps_BT.grad is not None
    counted_BT = batch.mask_BT > 0
    assert (logps_BT.grad[~counted_BT] == 0).all()
    assert (logps_BT.grad[counted_BT] != 0).any()
    for row, s in enumerate(sequences()):
        assert not counted_BT[row, list(s.environment)].any()
        assert not batch.completion_mask_BT[row, list(s.environment)].any()
        assert counted_BT[row].sum() == (s.num_model_tokens if s.valid else 0)
    assert len(batch.places_M) == sum(s.num_model_tokens for s in sequences())  # nothing else is computed


@pytest.mark.parametrize("size", [4, 1])
def test_micro_batches_do_not_change_it(policy: Policy, tiny_model: Path, size: int) -> None:
    for credit in ("episode", "turn"):
        whole, split = (step(policy, recipe_of(tiny_model, size=n), sequences(credit=credit))[0] for n in (8, size))
        assert distance(whole, split) < 1e-5


ONE_ADVANTAGE = {"rloo", "vespo", "gspo", "luspo"}  # refused with credit: turn


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name not in ONE_ADVANTAGE])
def test_one_advantage_at_every_token_is_the_advantage_of_the_episode(
    policy: Policy, tiny_model: Path, loss_type: str
) -> None:
    made = sequences()
    by_token = [replace(s, advantage=[float(s.advantage)] * len(s.completion_ids)) for s in made]  # type: ignore[arg-type]
    recipe = recipe_of(tiny_model, loss_type, beta=0.0)
    assert distance(step(policy, recipe, made)[0], step(policy, recipe, by_token)[0]) < 1e-6


def test_each_turn_moves_by_its_own_advantage(policy: Policy, tiny_model: Path) -> None:
    """On-policy the gradient is the sum of those of the turns alone."""
    made, recipe = sequences(old=False, credit="turn"), recipe_of(tiny_model, beta=0.0)
    whole, _ = step(policy, recipe, made)
    of_groups = [c for group in groups() for c in group.completions]
    parts = []
    for place in range(3):
        alone = []
        for s, completion in zip(made, of_groups, strict=True):
            of_turn = completion.episode.turns[place : place + 1] if completion.episode else []
            kept = {t for turn in of_turn for t in range(turn.start, turn.end)}
            advantages = [a if t in kept else 0.0 for t, a in enumerate(s.advantage)]  # type: ignore[arg-type]
            alone.append(replace(s, advantage=advantages))
        parts.append(step(policy, recipe, alone)[0])
    assert distance(whole, {name: sum(part[name] for part in parts) for name in whole}) < 1e-5  # type: ignore[misc]


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"whole_sequence": True}], ids=str)
def test_what_a_teacher_says_of_the_environments_tokens_moves_nothing(
    policy: Policy, tiny_model: Path, options: dict[str, Any]
) -> None:
    values = recipe_of(tiny_model, beta=0.0).model_dump()
    values["rollout"]["temperature"] = 1.0
    recipe = Recipe.model_validate(values | {"teacher": {"url": "http://nowhere", **options}})

    def told(lie: float) -> list[TrainedSequence]:
        return [replace(s, teacher=says(s, lie, tops="top_k" in options)) for s in sequences()]

    (ours, metrics), (lied, of_lie) = (step(policy, recipe, told(lie)) for lie in (-1.0, -9.0))
    assert all(torch.equal(ours[name], lied[name]) for name in ours)
    assert metrics == of_lie
    assert metrics["teacher/kl"] != 0


def says(s: TrainedSequence, of_environment: float, *, tops: bool) -> TeacherSays:
    values = [of_environment if t in s.environment else -2.0 - 0.1 * t for t in range(len(s.completion_ids))]
    return TeacherSays((), [[5, 6]] * len(values), [[x, x] for x in values]) if tops else TeacherSays(values)


def test_a_teacher_in_the_process_reads_them_and_is_not_compared_there(policy: Policy, tiny_model: Path) -> None:
    values = recipe_of(tiny_model, beta=0.0).model_dump()
    recipe = Recipe.model_validate(values | {"teacher": {"name": str(tiny_model), "dtype": "float32"}})
    assert policy.reference is not None
    policy.teacher = Teacher(policy.reference, torch.float32, policy.device, packed=True)
    try:
        made = sequences()
        (ours, metrics), (masked, of_mask) = (step(policy, recipe, of) for of in (made, with_a_mask(made)))
    finally:
        policy.teacher = None
    assert distance(masked, ours) < 1e-6
    assert metrics["teacher/kl"] == pytest.approx(of_mask["teacher/kl"], rel=1e-5)


def test_kl_in_the_reward_is_of_the_models_tokens(policy: Policy, tiny_model: Path) -> None:
    algorithm = {"kl_in_reward": True, "kl_estimator": "k1"}
    run, made = Run(recipe_of(tiny_model, **algorithm), policy, Path("unused")), groups()
    rewards_PG = np.array([[np.nan if r is None else r for r in group.rewards] for group in made])
    less_PG, metrics = less_kl(run, rewards_PG, made)
    batch = policy.collate(to_sequences(made, np.zeros((2, 4)), AlgorithmConfig()))
    with torch.no_grad():
        logps_BT, ref_BT = policy.statistics(batch, TEMPERATURE)[0], policy.reference_logprobs(batch, TEMPERATURE)
    kl_B = ((logps_BT - ref_BT) * batch.mask_BT).double().sum(1)
    assert (rewards_PG - less_PG).flatten()[:6] == pytest.approx((BETA * kl_B[:6]).numpy(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(float(kl_B.sum() / batch.mask_BT.sum()), rel=1e-5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_an_update_of_groups_takes_advantages_of_turns(
    policy: Policy, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    """Also with old log-probabilities of a pass of its own."""
    monkeypatch.setattr(policy, "step", lambda _: policy.optimizer.zero_grad(set_to_none=True))
    run = Run(recipe_of(tiny_model, num_iterations=iterations), policy, Path("unused"))
    metrics = update(run, groups(), np.random.default_rng(0).normal(size=(2, 4, 3)), 1.0)
    assert len(metrics) == iterations
    assert all(m["grad_norm"] > 0 and "sampling/nan_logprobs" not in m for m in metrics)


def test_a_selection_leaves_out_tokens_of_no_log_probability(policy: Policy, tiny_model: Path) -> None:
    """Of the step's tokens that count, and no others, half are kept."""
    recipe = recipe_of(tiny_model, beta=0.0, top_entropy_quantile=0.5)
    made = with_a_mask(sequences())
    _, metrics = step(policy, recipe, made)
    assert metrics["kept_tokens"] == pytest.approx(0.5, abs=0.02)  # a share of the tokens that count


def test_tokens_know_their_turns_advantage() -> None:
    completion = episode([1, 2, 3, 4, 5, 6], [(1, 3), (4, 6)], [-1.0] * 6)
    group = Group(Prompt(0, "", "", [9]), [completion], [1.0])
    (made,) = to_sequences([group], np.array([[[2.0, -1.0, 0.0]]]), AlgorithmConfig())
    assert made.advantage == [0.0, 2.0, 2.0, 0.0, -1.0, -1.0]
    assert made.environment == (0, 3)
    assert list(made.model_places()) == [1, 2, 4, 5]
    assert completion.model_token_ids() == [2, 3, 5, 6]
    assert made.has_advantage
    assert not replace(made, advantage=[0.0] * 6).has_advantage
