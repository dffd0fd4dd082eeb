"""The gradient of a step: the definition's, and the same however it is split over micro-batches and processes."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grpo.config.load import dump_recipe, load_recipe
from grpo.errors import RunError, UserError
from grpo.losses import LOSSES, Counts
from grpo.packing import to_sequences
from grpo.run.same_run import check_same_run, run_identity
from grpo.types import Batch, Completion, Group, Prompt, Status, TrainedSequence, VersionSpan
from grpo.update.forward import precompute_logprobs
from grpo.update.loss import micro_batch_loss
from grpo.update.metrics import RATIO, over_processes, step_metrics
from grpo.update.step import backward, optimizer_step, update, with_signal
from tests import gradient_of_step
from tests.conftest import make_policy, make_recipe, make_run
from tests.gradient_of_step import TEMPERATURE, gradient, recipe_for, sequences

BETA = 0.1
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
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


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "bnpo"])
@pytest.mark.parametrize("micro_batch_size", [4, 1])
def test_micro_batching_does_not_change_it(
    whole: Gradients, tiny_model: Path, tmp_path: Path, loss_type: str, micro_batch_size: int
) -> None:
    split, _ = gradient(recipe_for(str(tiny_model), loss_type, micro_batch_size, BETA), tmp_path / "out")
    assert distance(whole[loss_type], split) < 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
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
    kept = with_signal(sequences(), make_recipe(Path("x")))
    assert len(kept) == 5
    moves_all = [{"beta": 0.1}, {"entropy_coef": 0.01}, {"use_adaptive_entropy": True}, {"loss_type": "kl_cov"}]
    for options in moves_all:  # also those of zero advantage
        assert len(with_signal(sequences(), make_recipe(Path("x"), algorithm=options))) == 7, options
    assert len(with_signal(sequences(), make_recipe(Path("x"), teacher={"name": "y"}))) == 7
    in_reward = {"beta": 0.1, "kl_in_reward": True}  # then it is in the advantages
    assert len(with_signal(sequences(), make_recipe(Path("x"), algorithm=in_reward))) == 5


def test_no_signal_at_all_leaves_weights_and_moments_alone(tiny_model: Path, tmp_path: Path) -> None:
    policy = make_policy(tiny_model)
    run = make_run(policy, tmp_path)
    optimizer_step(run, sequences(), 1e-2)  # moments are now non-zero
    before = {name: t.clone() for name, t in policy.full_state().items()}
    flat = sequences()
    for s in flat:
        s.advantage = 0.0
    assert optimizer_step(run, flat, 1e-2) == {"skipped": 1.0}
    assert all(torch.equal(t, before[name]) for name, t in policy.full_state().items())


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_number_stops_before_the_step_and_dumps_the_batch(
    tiny_model: Path, tmp_path: Path, poison: str
) -> None:
    policy = make_policy(tiny_model)
    batch = sequences()
    if poison == "loss":
        batch[0].advantage = float("nan")
    else:
        policy.causal_lm.get_input_embeddings().weight.register_hook(lambda g: g * float("inf"))
    before = {name: t.clone() for name, t in policy.full_state().items()}
    with pytest.raises(RunError, match="nonfinite_rank_0"):
        optimizer_step(make_run(policy, tmp_path), batch, 1e-2)
    assert all(torch.equal(t, before[name]) for name, t in policy.full_state().items())
    dumped = torch.load(tmp_path / "nonfinite_rank_0.pt")
    assert len([s for micro_batch in dumped for s in micro_batch]) == 5


def test_a_batch_that_the_disk_refuses_does_not_hide_why_the_run_stops(tiny_model: Path, tmp_path: Path) -> None:
    batch = sequences()
    batch[0].advantage = float("nan")
    (tmp_path / "nonfinite_rank_0.pt").mkdir()
    with pytest.raises(RunError, match=r"the loss is nan .*The batch could not be written to .*rank_0\.pt \("):
        optimizer_step(make_run(make_policy(tiny_model), tmp_path), batch, 1e-2)


def test_precomputed_logprobs_are_the_policy_s_and_keep_their_places(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, needs_reference=True)
    given = sequences()
    run = make_run(policy, training={"micro_batch_size": 3}, rollout={"temperature": TEMPERATURE})
    found = precompute_logprobs(run, given, reference=True)
    for before, after in zip(given, found, strict=True):
        assert after.completion_ids == before.completion_ids
        ids = torch.tensor([after.prompt_ids + after.completion_ids])
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=ids).logits[0, len(after.prompt_ids) - 1 : -1] / TEMPERATURE
        expected = logits.log_softmax(-1).gather(1, torch.tensor(after.completion_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(after.old_logprobs), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(after.ref_logprobs), expected, atol=1e-4, rtol=0)


def test_unscorable_and_masked_completions_are_not_valid() -> None:
    statuses = (Status.STOP, Status.LENGTH, Status.ERROR, Status.ENVIRONMENT, Status.TURNS, Status.STOP)
    made = [Completion([1, 2], [-1.0, -1.0], status, "", []) for status in statuses]
    group = Group(Prompt(0, "", "", [3]), made, rewards=[1.0, 0.0, 0.0, 1.0, 0.0, None])
    algorithm = make_recipe(Path("x")).algorithm
    valid = [True, True, False, True, True, False]
    assert [s.valid for s in to_sequences([group], np.ones((1, 6)), algorithm)] == valid
    masking = algorithm.model_copy(update={"mask_truncated_completions": True})
    valid[1] = False  # an episode whose turns are used up was lost, not cut off
    assert [s.valid for s in to_sequences([group], np.ones((1, 6)), masking)] == valid


@pytest.mark.parametrize("unknown", [math.nan, -math.inf])
@pytest.mark.parametrize("mode", ["none", *MODES])
def test_a_token_without_a_sampler_s_logprob_is_left_out_and_counted(
    tiny_model: Path, tmp_path: Path, mode: str, unknown: float
) -> None:
    """The step is the one in which that token was never counted, in numerator and denominator."""
    made = [
        Completion([5 + i, 6, 7, 8] * 6, [-1.0 - i] * 24, Status.STOP, "", [VersionSpan(0, 24, 0)]) for i in range(4)
    ]
    group = Group(Prompt(0, "", "", [3, 4]), made, rewards=[1.0, 0.0, 0.0, 1.0])
    made[1].sampler_logprobs = [*([-2.0] * 3), unknown, *([-2.0] * 20)]
    advantages = np.array([[1.0, -1.0, -1.0, 1.0]])
    policy = make_policy(tiny_model)
    run = make_run(policy, tmp_path, algorithm={"importance_sampling_mode": mode, "loss_type": "dapo"})
    before = {name: t.clone() for name, t in policy.full_state().items()}
    (metrics,) = update(run, [group], advantages, 1e-3)
    assert metrics["sampling/nan_logprobs"] == 1.0
    assert all(math.isfinite(value) for value in metrics.values())
    assert not all(torch.equal(t, before[name]) for name, t in policy.full_state().items())
    (first,) = [s for s in to_sequences([group], advantages, run.recipe.algorithm) if s.uncounted]
    assert first.uncounted == (3,)
    assert policy.collate([first]).mask_BT.sum() == 23


def test_a_token_that_is_left_out_is_not_counted_in_the_denominator(tiny_model: Path, tmp_path: Path) -> None:
    """Left out at the end of a completion, it is as if it were not there."""
    norms = []
    for last in ([math.nan], []):
        made = [Completion([5 + i, 6, 7] * 4, [-1.0] * 12, Status.STOP, "", [VersionSpan(0, 12, 0)]) for i in range(2)]
        made[1].sampler_logprobs, made[1].token_ids = [*([-1.0] * 11), *last], made[1].token_ids[: 11 + len(last)]
        group = Group(Prompt(0, "", "", [3, 4]), made, rewards=[1.0, 0.0])
        run = make_run(make_policy(tiny_model), tmp_path, algorithm={"loss_type": "dapo"})
        norms.append(update(run, [group], np.array([[1.0, -1.0]]), 1e-3)[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_too_many_tokens_without_a_logprob_stop_the_run(tiny_model: Path, tmp_path: Path) -> None:
    made = [Completion([5, 6], [-1.0, math.nan], Status.STOP, "", [VersionSpan(0, 2, 0)]) for _ in range(2)]
    group = Group(Prompt(0, "", "", [3, 4]), made, rewards=[1.0, 0.0])
    run = make_run(make_policy(tiny_model), tmp_path)
    with pytest.raises(
        RunError, match=r"step 0: the sampler gave 2 of 4 tokens no finite log-probability .*vllm_dtype"
    ):
        update(run, [group], np.array([[1.0, -1.0]]), 1e-3)


def from_another_sampler() -> list[TrainedSequence]:
    """``sequences()``, drawn from what is not quite the policy that the clip range is around."""
    draw = random.Random(1)
    return [
        replace(s, sampler_logprobs=[logp + draw.gauss(0, 0.4) for logp in s.old_logprobs or []]) for s in sequences()
    ]


def corrected_gradient(
    model: Path, out: Path, mode: str, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(gradient_of_step, "sequences", from_another_sampler)
    recipe = recipe_for(str(model), "dapo", micro_batch_size, BETA)
    correction = {
        "importance_sampling_mode": mode,
        "importance_sampling_clip_min": 0.5,
        "importance_sampling_clip_max": 2.0,
    }
    recipe.algorithm = recipe.algorithm.model_copy(update=correction)
    return gradient(recipe, out)[0]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_micro_batching_does_not_change_the_corrected_gradient(
    whole: Gradients, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    by_size = {n: corrected_gradient(tiny_model, tmp_path / "out", mode, n, monkeypatch) for n in (8, 3, 1)}
    assert distance(by_size[8], by_size[3]) < 1e-5
    assert distance(by_size[8], by_size[1]) < 1e-5
    assert distance(whole["dapo"], by_size[8]) > 0.01


@pytest.mark.slow
def test_without_correction_the_sampler_s_logprobs_change_no_bit(
    whole: Gradients, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = corrected_gradient(tiny_model, tmp_path / "out", "none", 8, monkeypatch)
    assert all(torch.equal(found[name], grad) for name, grad in whole["dapo"].items())


def metrics_of_step(
    model: Path, batch: list[TrainedSequence], out: Path, mode: str, micro_batch_size: int | None
) -> dict:
    algorithm = {
        "importance_sampling_mode": mode,
        "importance_sampling_clip_min": 0.7,
        "importance_sampling_clip_max": 1.5,
    }
    training, rollout = {"micro_batch_size": micro_batch_size}, {"temperature": TEMPERATURE}
    run = make_run(make_policy(model), out, algorithm=algorithm, training=training, rollout=rollout)
    return optimizer_step(run, batch, 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_importance_sampling_metrics(tiny_model: Path, tmp_path: Path, mode: str, micro_batch_size: int | None) -> None:
    """Over all micro-batches, by hand from what the sequences that take part hold."""
    batch = from_another_sampler()
    found = metrics_of_step(tiny_model, batch, tmp_path, mode, micro_batch_size)
    ratios, of_tokens = [], []
    for s in with_signal(batch, make_recipe(tiny_model)):
        log_ratios = [old - logp for old, logp in zip(s.old_logprobs or [], s.sampler_logprobs, strict=True)]
        if mode.startswith("sequence"):
            ratios += [math.exp(sum(log_ratios))]
            of_tokens += ratios[-1:] * len(log_ratios)
        else:
            ratios += [math.exp(d) for d in log_ratios]
            of_tokens = ratios
    clipped = [not 0.7 <= r <= 1.5 for r in of_tokens]
    assert 0 < sum(clipped) < len(clipped)
    assert found[f"{RATIO}/min"] == pytest.approx(min(ratios), rel=1e-4)
    assert found[f"{RATIO}/max"] == pytest.approx(max(ratios), rel=1e-4)
    assert found[f"{RATIO}/mean"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert found["sampling/importance_sampling_clipped"] == pytest.approx(sum(clipped) / len(clipped))
    assert not [name for name in found if name.endswith("/count")]


def test_with_one_update_a_rollout_the_ratio_is_to_the_current_policy(tiny_model: Path, tmp_path: Path) -> None:
    """Sampled by the policy itself: 1 to rounding. By one that was half as sure of each token: 2."""
    run = make_run(make_policy(tiny_model), rollout={"temperature": TEMPERATURE})
    own = precompute_logprobs(run, sequences(), reference=False)
    for factor in (1.0, 2.0):
        batch = [
            replace(s, old_logprobs=None, sampler_logprobs=[logp - math.log(factor) for logp in s.old_logprobs or []])
            for s in own
        ]
        found = metrics_of_step(tiny_model, batch, tmp_path, "token_mask", 3)
        assert [found[f"{RATIO}/{end}"] for end in ("min", "mean", "max")] == pytest.approx([factor] * 3, rel=1e-3)
        assert found["sampling/importance_sampling_clipped"] == float(factor > 1.5)
        assert (found["grad_norm"] == 0) == (factor > 1.5)


def test_without_correction_there_are_no_metrics_of_it(tiny_model: Path, tmp_path: Path) -> None:
    found = metrics_of_step(tiny_model, from_another_sampler(), tmp_path, "none", 3)
    assert {name for name in found if name.startswith("sampling/")} == {
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
    }


@pytest.mark.parametrize("mode", MODES)
def test_padding_micro_batches_do_not_disturb_the_metrics(tiny_model: Path, tmp_path: Path, mode: str) -> None:
    """Whether they are this process's or another's."""
    policy = make_policy(tiny_model)
    recipe = make_recipe(tiny_model, algorithm={"importance_sampling_mode": mode})
    algorithm = recipe.algorithm
    batch = with_signal(from_another_sampler(), recipe)
    filler = [replace(batch[0], weight=0.0)]

    def totals(micro_batches: list[list[TrainedSequence]]) -> dict[str, float]:
        def loss_of(b: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            counts = Counts(100, 5, 2, 40)
            return micro_batch_loss(policy, b, counts, algorithm, temperature=TEMPERATURE, entropy_coef=0.0)

        policy.optimizer.zero_grad()
        return backward(make_run(policy, tmp_path), micro_batches, loss_of)[0]

    plain, padding = totals([batch]), totals([filler])
    assert totals([filler, batch, filler]) == plain
    assert 0 < plain[f"{RATIO}/min"] < plain[f"{RATIO}/max"]
    two = SimpleNamespace(gather=lambda row: torch.cat([row, theirs]))
    theirs = torch.tensor([[padding[name] for name in sorted(padding)]], dtype=torch.float64)
    found = over_processes(two, {name: torch.tensor(value) for name, value in plain.items()})
    assert found == pytest.approx(plain)
    assert step_metrics(found, 0.0) == pytest.approx(step_metrics(dict(plain), 0.0))


def recipe_file(folder: Path, **algorithm: object) -> Path:
    content = {
        "model": {"name": "m"},
        "data": {"name": "countdown"},
        "rewards": [{"name": "countdown"}],
        "algorithm": algorithm,
        "training": {"output_dir": "unused"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(content))
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ([], "none"),
        (["rollout.backend=vllm"], "token_truncate"),
        (["rollout.backend=vllm", "algorithm.importance_sampling_mode=none"], "none"),
        (["algorithm.importance_sampling_mode=sequence_mask"], "sequence_mask"),
    ],
)
def test_the_mode_follows_the_backend_unless_it_is_given(tmp_path: Path, overrides: list[str], mode: str) -> None:
    """And the resolved recipe says which it was: it reads back equal, and is the same run."""
    recipe = load_recipe(recipe_file(tmp_path), overrides)
    assert recipe.algorithm.importance_sampling_mode == mode
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_recipe(recipe))
    again = load_recipe(resolved)
    assert again == recipe
    manifest = json.loads(json.dumps(run_identity(recipe, world_size=1, threads=1)))
    check_same_run(manifest, run_identity(again, world_size=1, threads=1))


@pytest.mark.parametrize("wrong", [{"clip_max": 1.0}, {"clip_min": 1.0}, {"clip_min": 2.0, "clip_max": 3.0}])
def test_a_window_without_1_is_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    keys = {f"importance_sampling_{name}": value for name, value in wrong.items()}
    with pytest.raises(UserError, match=r"importance_sampling_clip_m\w+: must be (above|below) 1"):
        load_recipe(recipe_file(tmp_path, **keys))
