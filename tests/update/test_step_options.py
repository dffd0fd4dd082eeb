"""What the options of the losses do to a step of a real model: entropy, selections of tokens, KL in the reward,
truncated sampling; and that a run with them goes on from its checkpoint to the same bits."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from grpo import trainer
from grpo.losses import kl_estimate
from grpo.model.truncation import truncate
from grpo.run.folder import release_run_folder
from grpo.run.run import Run
from grpo.types import Completion, Group, Prompt, Status, TrainedSequence
from grpo.update.forward import precompute_logprobs
from grpo.update.kl_in_reward import less_kl
from grpo.update.step import optimizer_step
from tests import gradient_of_step
from tests.conftest import make_policy, make_recipe, make_run
from tests.gradient_of_step import TEMPERATURE, gradient, recipe_for, sequences
from tests.launching import ROOT
from tests.update.test_step import distance

AS_DRAWN = {"temperature": TEMPERATURE, "max_completion_length": 40}
OPTIONS: dict[str, dict[str, Any]] = {
    "entropy bonus": {"entropy_coef": 0.5},
    "top entropy": {"top_entropy_quantile": 0.4},
    "top entropy and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.5},
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "level sequence": {"importance_sampling_level": "sequence"},
    "level sequence_token": {"importance_sampling_level": "sequence_token", "loss_type": "gspo"},
    "corrected KL": {"beta": 0.1, "use_bias_correction_kl": True},
    "clip_cov": {"loss_type": "clip_cov", "clip_cov_ratio": 0.1, "clip_cov_lb": 0.01},
    "kl_cov": {"loss_type": "kl_cov", "kl_cov_ratio": 0.1},
    "vespo": {"loss_type": "vespo"},
}


def near_the_policy(model: Path) -> list[TrainedSequence]:
    """``sequences()`` with what a policy not far from this one said of them: ratios inside of a clip range."""
    found = precompute_logprobs(make_run(make_policy(model), rollout=AS_DRAWN), sequences(), reference=False)
    draw = random.Random(2)
    old = [[logp + draw.gauss(0, 0.1) for logp in s.old_logprobs or []] for s in found]
    sampler = [[logp + draw.gauss(0.3, 0.5) for logp in logps] for logps in old]
    return [replace(s, old_logprobs=o, sampler_logprobs=m) for s, o, m in zip(found, old, sampler, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_micro_batches_do_not_matter(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    near = near_the_policy(tiny_model)
    monkeypatch.setattr(gradient_of_step, "sequences", lambda: near)

    def found(size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
        recipe = recipe_for(str(tiny_model), "dapo", size, 0.0)
        recipe.algorithm = recipe.algorithm.model_copy(update=options)
        return gradient(recipe, tmp_path / "out")[0]

    whole = found(8, OPTIONS[name])
    for size in (3, 1):
        assert distance(whole, found(size, OPTIONS[name])) < 1e-5
    if "loss_type" not in OPTIONS[name]:
        assert distance(found(8, {}), whole) > 1e-3


def step(run: Run, batch: list[TrainedSequence], learning_rate: float = 0.0) -> dict[str, float]:
    return optimizer_step(run, batch, learning_rate)


def test_the_bonus_raises_the_entropy_and_its_gradient_is_autograd_s(tiny_model: Path, tmp_path: Path) -> None:
    """Against transformers' own logits; without advantages, so that nothing else moves."""
    flat = [replace(s, advantage=0.0) for s in sequences()]
    policy = make_policy(tiny_model, optimizer={"max_grad_norm": 0.0}, sharpen=3.0)
    run = make_run(policy, tmp_path, algorithm={"entropy_coef": 0.3}, rollout=AS_DRAWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "step", lambda rate: None)
        found = step(run, flat)
    ours = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.optimizer.zero_grad()
    valid = [s for s in flat if s.valid]
    tokens = sum(len(s.completion_ids) for s in valid)
    mean = torch.zeros(())
    for s in valid:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        logits = policy.causal_lm(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / TEMPERATURE
        mean = mean - (logits.softmax(-1) * logits.log_softmax(-1)).sum() / tokens
    (-0.3 * mean).backward()
    assert distance({name: p.grad for name, p in policy.model.named_parameters()}, ours) < 1e-4
    assert found["entropy_of_bonus"] == pytest.approx(float(mean.detach()), rel=1e-5)
    assert found["entropy_coef"] == 0.3
    assert found["loss"] == pytest.approx(-0.3 * found["entropy_of_bonus"], rel=1e-5)
    assert found["policy_loss"] == 0.0

    before, after = (step(run, flat, learning_rate=1e-3)["entropy"] for _ in range(2))
    assert after > before


def test_the_adaptive_coefficient_moves_with_the_entropy(tiny_model: Path, tmp_path: Path) -> None:
    numbers = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.1}
    run = make_run(make_policy(tiny_model), tmp_path, rollout=AS_DRAWN)
    coefficients, applied = [], []
    for target in (99.0, 99.0, 0.0):
        run.recipe = make_recipe(tiny_model, algorithm=numbers | {"entropy_target": target}, rollout=AS_DRAWN)
        found = step(run, sequences())
        coefficients.append(found["entropy_coef"])
        applied.append((found["policy_loss"] - found["loss"]) / found["entropy_of_bonus"])
    assert coefficients == pytest.approx([0.2, 0.3, 0.2])
    assert applied == pytest.approx([0.0, 0.2, 0.0], abs=1e-6)  # first nothing was measured; then above the target


@pytest.mark.parametrize("updates", ["one", "several"])
@pytest.mark.parametrize("rollout", [{"top_p": 0.7}, {"top_k": 20}, {"min_p": 0.3}])
def test_truncated_sampling_by_the_policy_itself_is_no_mismatch(
    tiny_model: Path, tmp_path: Path, rollout: dict[str, float], updates: str
) -> None:
    """The sampler's log-probabilities are of what is left, renormalized; of tokens that were left."""
    policy = make_policy(tiny_model, sharpen=3.0, rollout=rollout)
    batch = []
    for s in sequences():
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1].float() / TEMPERATURE
        kept = truncate(logits, **policy.truncation._asdict()).log_softmax(-1)
        full = logits.log_softmax(-1)
        left = (full - kept).masked_fill(kept.isinf(), -torch.inf).amax(1)
        logps = full.gather(1, torch.tensor(s.completion_ids)[:, None])[:, 0] - left
        batch.append(replace(s, sampler_logprobs=logps.tolist(), old_logprobs=None))
    sections = {"algorithm": {"importance_sampling_mode": "token_truncate"}, "rollout": rollout | AS_DRAWN}
    run = make_run(policy, tmp_path, **sections)
    if updates == "several":
        batch = precompute_logprobs(run, batch, reference=False)
    found = step(run, batch)
    name = "sampling/importance_sampling_ratio"
    for end, wanted in [("min", 1.0), ("mean", 1.0), ("max", 1.0), ("std", 0.0)]:
        assert found[f"{name}/{end}"] == pytest.approx(wanted, abs=2e-3)
    assert found["sampling/sampling_logp_difference/max"] < 2e-3
    if updates == "one":
        assert step(make_run(make_policy(tiny_model, sharpen=3.0), tmp_path, **sections), batch)[f"{name}/mean"] < 0.95


def test_spread_of_the_ratio(tiny_model: Path, tmp_path: Path) -> None:
    """Of a sampler that was half as sure of every token of some sequences and twice as sure of the others'."""
    algorithm = {"importance_sampling_mode": "token_truncate"}
    run = make_run(make_policy(tiny_model), tmp_path, algorithm=algorithm, rollout=AS_DRAWN)
    own = precompute_logprobs(run, sequences(), reference=False)
    ratios, batch = [], []
    for i, s in enumerate(own):
        ratio = 2.0 if i % 2 else 0.5
        batch.append(replace(s, sampler_logprobs=[logp - np.log(ratio) for logp in s.old_logprobs or []]))
        if s.valid and s.advantage:
            ratios += [ratio] * len(s.completion_ids)
    found = step(run, batch)
    assert found["sampling/importance_sampling_ratio/std"] == pytest.approx(np.std(ratios), rel=1e-3)
    share = np.sum(ratios) ** 2 / (len(ratios) * np.sum(np.square(ratios)))
    assert found["sampling/effective_sample_size"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize(
    ("loss_type", "names"),
    [
        ("dapo", {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}),
        ("rloo", {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}),
        ("cispo", {"cispo_clip_ratio"}),
        ("vespo", {"vespo/phi_seq_mean"}),
        ("kl_cov", {"kept_tokens"}),
        ("sapo", set()),
    ],
)
def test_what_a_loss_logs(tiny_model: Path, tmp_path: Path, loss_type: str, names: set[str]) -> None:
    """TRL's names, means that lie where they can."""
    run = make_run(make_policy(tiny_model), tmp_path, algorithm={"loss_type": loss_type}, rollout=AS_DRAWN)
    found = step(run, near_the_policy(tiny_model))
    common = {"loss", "grad_norm", "entropy"}
    assert {name for name in found if not name.startswith("sampling/")} == common | names
    assert all(0 <= found[name] <= 1.2 for name in names)
    if "vespo/phi_seq_mean" in names:  # of sequences, not of tokens
        phis = []
        batch = [s for s in near_the_policy(tiny_model) if s.valid and s.advantage]
        now = precompute_logprobs(make_run(make_policy(tiny_model), rollout=AS_DRAWN), batch, reference=False)
        for s, n in zip(batch, now, strict=True):
            w = float(np.exp(np.sum(n.old_logprobs) - np.sum(s.old_logprobs)))
            k, decay = (2.0, 3.0) if s.advantage >= 0 else (3.0, 2.0)
            phis.append(np.exp(decay) * w**k * np.exp(-decay * w))
        assert found["vespo/phi_seq_mean"] == pytest.approx(np.mean(phis), rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_in_the_reward_is_the_completion_s_sum(tiny_model: Path, estimator: str) -> None:
    algorithm = {"beta": 0.2, "kl_in_reward": True, "kl_estimator": estimator}
    policy = make_policy(tiny_model, needs_reference=True)
    run = make_run(policy, algorithm=algorithm, rollout=AS_DRAWN)
    with torch.no_grad():
        for i, parameter in enumerate(policy.reference.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    made = [Completion(s.completion_ids, s.sampler_logprobs, Status.STOP, "", []) for s in sequences()[:4]]
    group = Group(Prompt(0, "", "", sequences()[0].prompt_ids), made, rewards=[1.0, 0.0, None, 0.5])
    rewards_PG = np.array([[1.0, 0.0, np.nan, 0.5]])
    found_PG, metrics = less_kl(run, rewards_PG, [group])

    kls, tokens = [], 0
    for completion in made:
        ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
        logps = []
        for model in (policy.causal_lm, policy.reference.causal_lm):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(group.prompt.token_ids) - 1 : -1] / TEMPERATURE
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0])
        kls.append(float(kl_estimate(*logps, estimator=estimator).sum()))
        tokens += len(completion.token_ids)
    assert found_PG[0, [0, 1, 3]] == pytest.approx(
        [r - 0.2 * kls[i] for i, r in [(0, 1.0), (1, 0.0), (3, 0.5)]], abs=1e-3
    )
    assert np.isnan(found_PG[0, 2])
    of_scored = tokens - len(made[2].token_ids)
    assert metrics["kl"] == pytest.approx((sum(kls) - kls[2]) / of_scored, rel=1e-3, abs=1e-5)
    run.recipe = make_recipe(tiny_model, algorithm={"beta": 0.2})
    assert less_kl(run, rewards_PG, [group])[0] is rewards_PG


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Trains the tiny model in this process; the run's folder."""
    threads = torch.get_num_threads()

    def run(name: str, algorithm: dict[str, Any], steps: int, *, resume: bool = False, **more: Any) -> Path:
        folder = tmp_path / name
        recipe = make_recipe(
            tiny_model,
            data={"args": {"question": "compact"}, "train_size": 64, "eval_size": 4, "max_prompt_length": 32},
            rewards=[{"path": f"{ROOT}/tests/rewards_for_tests.py:share_of_small_numbers"}],
            rollout={"num_generations": 4, "max_completion_length": 8} | more,
            scoring={"workers": 1},
            optimizer={"learning_rate": 1e-3},
            evaluation={"at_start": False},
            algorithm=algorithm,
            training={
                "output_dir": str(folder),
                "prompts_per_step": 2,
                "max_steps": steps,
                "num_threads": 1,
                "eval_every": 0,
                "save_every": 1,
            },
        )
        monkeypatch.setattr(trainer, "write_report_at_end", lambda folder: None)  # takes seconds
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            trainer.train(recipe, resume)
        finally:
            release_run_folder(folder)
        return folder

    yield run
    torch.set_num_threads(threads)


def last_step(folder: Path) -> dict[str, Any]:
    """Its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in reversed(rows) if "reward" in row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm",
    [
        {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 99.0, "top_entropy_quantile": 0.5},
        {"loss_type": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": 0.0, "num_minibatches": 2},
        {"loss_type": "rloo", "beta": 0.05},
        {"loss_type": "reinforce_pp", "beta": 0.05, "num_minibatches": 2},
    ],
    ids=["adaptive", "clip_cov", "rloo", "reinforce_pp"],
)
def test_a_resumed_run_ends_in_the_same_bits(run: Callable[..., Path], algorithm: dict[str, Any]) -> None:
    whole = run("whole", algorithm, 4)
    run("parts", algorithm, 2)
    parts = run("parts", algorithm, 4, resume=True)
    weights = [
        hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest() for folder in (whole, parts)
    ]
    assert weights[0] == weights[1]
    rows = [last_step(folder) for folder in (whole, parts)]
    for name in ("entropy_coef", "kl", "reward", "grad_norm"):
        assert rows[0].get(name) == rows[1].get(name)
    assert "grad_norm" in rows[0]
    assert ("kl" in rows[0]) == ("beta" in algorithm)


@pytest.mark.slow
def test_a_loss_of_the_user_s_own_trains(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from grpo.losses import loss\nfrom grpo.losses.tokens import by_tokens, token_sum\n\n"
        "@loss(reduce=token_sum, denominator=by_tokens)\ndef surrogate(tokens, options):\n"
        "    r, A = tokens.ratio_BT, tokens.advantages_B1\n"
        "    return -(r * A).minimum(r.clamp(1 - options.epsilon, 1 + options.high) * A)\n"
    )
    mine = run("mine", {"loss_type": f"{tmp_path}/mine.py:surrogate"}, 2)
    dapo = run("dapo", {"loss_type": "dapo"}, 2)
    rows = [last_step(folder) for folder in (mine, dapo)]
    assert rows[0]["grad_norm"] == rows[1]["grad_norm"]
    assert rows[0]["loss"] == rows[1]["loss"]
