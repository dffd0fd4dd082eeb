"""The gradient of a step: the definition's, and the same however it is split over micro-batches and processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.errors import RunError
from grpo.losses import LOSSES
from grpo.types import Completion, Group, Prompt, Status
from grpo.update import optimizer_step, precompute_logprobs, to_sequences, with_signal
from tests.conftest import make_policy, make_recipe
from tests.gradient_of_step import TEMPERATURE, gradient, recipe_for, sequences
from tests.launching import DDP, FSDP2, ROOT, launch

BETA = 0.1
Gradients = dict[str, dict[str, torch.Tensor]]


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of two gradients, all parameters as one vector."""
    assert one.keys() == other.keys()
    a, b = (torch.cat([g[name].flatten().double() for name in one]) for g in (one, other))
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Gradients:
    """One process, one micro-batch of eight."""
    out = tmp_path_factory.mktemp("gradients") / "out"
    return {name: gradient(recipe_for(str(tiny_model), name, 8, BETA), out)[0] for name in LOSSES}


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "bnpo"])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_micro_batching_does_not_change_it(
    whole: Gradients, tiny_model: Path, tmp_path: Path, loss_type: str, micro_batch_size: int
) -> None:
    split, _ = gradient(recipe_for(str(tiny_model), loss_type, micro_batch_size, BETA), tmp_path / "out")
    assert distance(whole[loss_type], split) < 1e-5


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("kind", "sharded"), [(DDP, False), (FSDP2, True)], ids=["ddp", "fsdp2"])
def test_two_processes_do_not_change_it(
    whole: Gradients, tiny_model: Path, tmp_path: Path, kind: list[str], sharded: bool
) -> None:
    out = tmp_path / "out.pt"
    done = launch(kind, ROOT / "tests/gradient_of_step.py", tiny_model, out, 2, BETA)
    assert done.returncode == 0, done.stderr
    found = torch.load(out)
    assert (found["processes"], found["sharded"]) == (2, sharded)
    for name in LOSSES:
        if name != "bnpo":
            assert distance(whole[name], found["gradients"][name]) < 1e-5, name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_it_is_the_gradient_of_the_definition(tiny_model: Path, tmp_path: Path, loss_type: str) -> None:
    """Against autograd through transformers' own logits, sequence by sequence, no packing and no chunks; beta is 0, so
    sequences without signal are left out by ours and not by the definition."""
    recipe = recipe_for(str(tiny_model), loss_type, 8, 0.0)
    ours, policy = gradient(recipe, tmp_path / "out")
    policy.optimizer.zero_grad()
    valid = [s for s in sequences() if s.valid]
    tokens = sum(len(s.completion_ids) for s in valid)
    # bnpo's mean is over the tokens of a micro-batch, and those without signal are not in it
    contributing_tokens = sum(len(s.completion_ids) for s in valid if s.advantage)
    total = torch.zeros(())
    for s in valid:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = policy.causal_lm(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / TEMPERATURE
        logps = logits.log_softmax(-1).gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0]
        ratio = (logps - torch.tensor(s.old_logprobs)).exp()
        loss = -torch.minimum(ratio * s.advantage, ratio.clamp(1 - 5.0, 1 + 5.0) * s.advantage)
        scale = {
            "grpo": 1 / (len(valid) * len(loss)),
            "dr_grpo": 1 / (len(valid) * 40),
            "dapo": 1 / tokens,
            "bnpo": 1 / contributing_tokens,
        }[loss_type]
        total = total + loss.sum() * scale
    total.backward()
    expected = {name: p.grad for name, p in policy.model.named_parameters()}
    assert distance(expected, ours) < 1e-5


def test_groups_without_signal_and_invalid_sequences_take_no_part() -> None:
    algorithm = make_recipe(Path("x")).algorithm
    kept = with_signal(sequences(), algorithm)
    assert len(kept) == 5
    with_kl = with_signal(sequences(), algorithm.model_copy(update={"beta": 0.1}))
    assert len(with_kl) == 7  # the KL penalty moves those of zero advantage too


def test_no_signal_at_all_leaves_weights_and_moments_alone(tiny_model: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_model)
    recipe = make_recipe(tiny_model)
    step = {"temperature": 1.0, "learning_rate": 1e-2, "max_completion_length": 40, "dump_to": tmp_path}
    optimizer_step(policy, sequences(), recipe.algorithm, recipe.training, **step)  # moments are now non-zero
    before = {name: t.clone() for name, t in policy.full_state().items()}
    flat = sequences()
    for s in flat:
        s.advantage = 0.0
    assert optimizer_step(policy, flat, recipe.algorithm, recipe.training, **step) == {"skipped": 1.0}
    assert all(torch.equal(t, before[name]) for name, t in policy.full_state().items())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_number_stops_before_the_step_and_dumps_the_batch(
    tiny_model: Path, tmp_path: Path, poison: str
) -> None:
    policy = make_policy(tiny_model)
    recipe = make_recipe(tiny_model)
    batch = sequences()
    if poison == "loss":
        batch[0].advantage = float("nan")
    else:
        policy.causal_lm.get_input_embeddings().weight.register_hook(lambda g: g * float("inf"))
    before = {name: t.clone() for name, t in policy.full_state().items()}
    with pytest.raises(RunError, match="nonfinite_rank_0"):
        optimizer_step(
            policy,
            batch,
            recipe.algorithm,
            recipe.training,
            temperature=1.0,
            learning_rate=1e-2,
            max_completion_length=40,
            dump_to=tmp_path,
        )
    assert all(torch.equal(t, before[name]) for name, t in policy.full_state().items())
    dumped = torch.load(tmp_path / "nonfinite_rank_0.pt")
    assert len([s for micro_batch in dumped for s in micro_batch]) == 5


def test_precomputed_logprobs_are_the_policy_s_and_keep_their_places(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, needs_reference=True)
    recipe = make_recipe(tiny_model, training={"micro_batch_size": 3})
    given = sequences()
    found = precompute_logprobs(policy, given, recipe.training, temperature=TEMPERATURE, reference=True)
    for before, after in zip(given, found, strict=True):
        assert after.completion_ids == before.completion_ids
        ids = torch.tensor([after.prompt_ids + after.completion_ids])
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=ids).logits[0, len(after.prompt_ids) - 1 : -1] / TEMPERATURE
        expected = logits.log_softmax(-1).gather(1, torch.tensor(after.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(after.old_logprobs), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(after.ref_logprobs), expected, atol=1e-4, rtol=0)


def test_unscorable_and_masked_completions_are_not_valid() -> None:
    made = [Completion([1, 2], [-1.0, -1.0], status, "", []) for status in (*Status, Status.STOP)]
    group = Group(Prompt(0, "", "", [3]), made, rewards=[1.0, 0.0, 0.0, None])
    algorithm = make_recipe(Path("x")).algorithm
    assert [s.valid for s in to_sequences([group], [[1.0] * 4], algorithm)] == [True, True, False, False]
    masking = algorithm.model_copy(update={"mask_truncated_completions": True})
    assert [s.valid for s in to_sequences([group], [[1.0] * 4], masking)] == [True, False, False, False]
