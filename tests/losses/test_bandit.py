"""The expected gradient of the losses, exactly: on a policy small enough to list all that it can say.

It says one token or two: token 0 first ends the completion, so that lengths differ. The expectation is the sum over all
groups of completions that can be sampled, each with its probability; the truth is the gradient of the expected reward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from grpo.advantages import group_advantages
from grpo.losses import Counts, importance_weights, kl_estimate
from tests.losses.calling import policy_loss

OUTCOMES = [(0,), *((a, b) for a in (1, 2) for b in range(3))]
LENGTHS = torch.tensor([len(outcome) for outcome in OUTCOMES], dtype=torch.float64)
MASK_NT = torch.tensor([[1.0, float(len(outcome) > 1)] for outcome in OUTCOMES], dtype=torch.float64)
REWARDS = np.array([0.3, 1.0, 0.0, -0.5, 2.0, 0.1, 0.9])
MAX_LENGTH, G = 2, 3


def parameters(seed: int = 0) -> torch.Tensor:
    """Logits of the first token, and of the second after 1 and after 2, (3,3)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, generator=g, dtype=torch.float64).requires_grad_()


def logps_of(table: torch.Tensor) -> torch.Tensor:
    """Of every outcome's tokens, (7,2)."""
    log_p = table.log_softmax(-1)
    second = [log_p.new_zeros(()) if len(y) == 1 else log_p[y[0], y[1]] for y in OUTCOMES]
    return torch.stack([torch.stack([log_p[0, y[0]], there]) for y, there in zip(OUTCOMES, second, strict=True)])


def of_completions(table: torch.Tensor) -> torch.Tensor:
    """Log-probability of every outcome, (7,)."""
    return (logps_of(table) * MASK_NT).sum(1)


def gradient(value: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, table)[0].flatten()


def true_gradient(rewards_N: np.ndarray = REWARDS) -> torch.Tensor:
    table = parameters()
    return gradient((of_completions(table).exp() * torch.tensor(rewards_N)).sum(), table)


def weighted_truth(weights_N: torch.Tensor) -> torch.Tensor:
    """Sum over outcomes of p weight grad log p."""
    table = parameters()
    log_p_N = of_completions(table)
    return gradient((log_p_N.exp().detach() * weights_N * log_p_N).sum(), table)


def sampled_counts(mask_GT: torch.Tensor) -> Counts:
    return Counts(int(mask_GT.sum()), len(mask_GT), 1, MAX_LENGTH)


def constant_counts(mask_GT: torch.Tensor) -> Counts:
    """As if the step had so many groups that the number of its tokens hardly varies: here one a sequence."""
    return Counts(len(mask_GT), len(mask_GT), 1, MAX_LENGTH)


def expected_gradient(
    loss_type: str,
    *,
    baseline: str = "leave_one_out",
    scale_rewards: str = "none",
    counts: Callable[[torch.Tensor], Counts] = constant_counts,
    rewards_N: np.ndarray = REWARDS,
    size: int = G,
    **options: float | str | None,
) -> torch.Tensor:
    """Minus that of the loss, over all groups."""
    table = parameters()
    logps_NT = logps_of(table)
    chances_N = of_completions(table).exp().detach()
    total = torch.zeros((), dtype=torch.float64)
    for members in itertools.product(range(len(OUTCOMES)), repeat=size):
        group = list(members)
        advantages_G = group_advantages(rewards_N[None, group], scale_rewards=scale_rewards, baseline=baseline)[0]
        mask_GT = MASK_NT[group]
        loss, _ = policy_loss(
            logps_NT[group],
            None,
            None,
            torch.tensor(advantages_G),
            mask_GT,
            counts(mask_GT),
            loss_type=loss_type,
            **options,
        )
        total = total + chances_N[group].prod() * loss
    return -gradient(total, table)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Each with what its divisor makes of the gradient, on-policy and without scaling.
@pytest.mark.parametrize(
    ("loss_type", "factor"),
    [
        ("reinforce", 1.0),
        ("rloo", 1.0),
        ("luspo", 1.0),
        ("dr_grpo", 1 / MAX_LENGTH),
        ("dapo", 1.0),  # these five where the tokens of a step do not vary
        ("cispo", 1.0),
        ("vespo", 1.0),
        ("reinforce_pp", 1.0),
        ("kl_cov", 1.0),
    ],
)
def test_unbiased_with_a_leave_one_out_baseline(loss_type: str, factor: float) -> None:
    assert error(expected_gradient(loss_type), factor * true_gradient()) < 1e-12


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("loss_type", ["reinforce", "luspo", "dr_grpo"])
def test_the_group_s_mean_as_baseline_shrinks_the_gradient_and_no_more(loss_type: str, size: int) -> None:
    """(G - 1) / G of it: each reward is in its own baseline."""
    factor = (size - 1) / size / (MAX_LENGTH if loss_type == "dr_grpo" else 1)
    found = expected_gradient(loss_type, baseline="group", size=size)
    assert error(found, factor * true_gradient()) < 1e-12


def test_a_step_s_mean_as_baseline_shrinks_it_by_the_completions_own_share() -> None:
    """(N - 1) / N of it, for a step of N completions, here of one group."""
    found = expected_gradient("reinforce_pp", baseline="batch", size=3)
    assert error(found, 2 / 3 * true_gradient()) < 1e-12


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "sapo"])
def test_means_over_sequences_weigh_a_completion_by_one_over_its_length(loss_type: str) -> None:
    """The gradient is sum p (R - E[R]) / length grad log p, which is not that of the expected reward."""
    chances_N = of_completions(parameters()).exp().detach()
    rewards_N = torch.tensor(REWARDS)
    documented = weighted_truth((rewards_N - (chances_N * rewards_N).sum()) / LENGTHS)
    found = expected_gradient(loss_type)
    assert error(found, documented) < 1e-12
    truth = true_gradient()
    assert error(found * truth.norm() / found.norm(), truth) > 0.05


def test_dividing_by_the_tokens_sampled_favours_groups_of_short_completions() -> None:
    """dapo, cispo, vespo: sum over groups of P sum A grad log p / tokens, here by loops over groups."""
    chances_N = of_completions(parameters()).exp().detach()
    weights_N = torch.zeros(len(OUTCOMES), dtype=torch.float64)
    for members in itertools.product(range(len(OUTCOMES)), repeat=G):
        tokens = sum(len(OUTCOMES[i]) for i in members)
        others = [sum(REWARDS[j] for j in members) - REWARDS[i] for i in members]
        for i, rest in zip(members, others, strict=True):
            chance_of_rest = float(chances_N[list(members)].prod() / chances_N[i])
            weights_N[i] += chance_of_rest * (REWARDS[i] - rest / (G - 1)) / tokens
    documented = weighted_truth(weights_N)
    for loss_type in ("dapo", "cispo", "vespo"):
        found = expected_gradient(loss_type, counts=sampled_counts)
        assert error(found, documented) < 1e-12
    truth = true_gradient()
    assert error(found * truth.norm() / found.norm(), truth) > 0.01


def test_dividing_by_the_group_s_deviation_forgets_how_much_better() -> None:
    """In groups of two the advantage is +-1/sqrt(2): only which reward is larger counts, and the gradient is that of
    winning against another completion."""
    chances_N = of_completions(parameters()).exp().detach()
    wins_N = [sum(float(c) * np.sign(r - s) for s, c in zip(REWARDS, chances_N, strict=True)) for r in REWARDS]
    documented = weighted_truth(torch.tensor(wins_N) / 2**0.5)
    found = expected_gradient("reinforce", baseline="group", scale_rewards="group", size=2)
    assert error(found, documented) < 2e-3  # the deviation's offset of 1e-4
    tenfold = expected_gradient("reinforce", baseline="group", scale_rewards="group", size=2, rewards_N=10 * REWARDS)
    assert error(tenfold, found) < 2e-3
    truth = true_gradient()
    assert error(found * truth.norm() / found.norm(), truth) > 0.05


@pytest.mark.slow
def test_kl_in_the_reward_is_the_gradient_of_reward_less_kl() -> None:
    """k1 alone: of whole completions, what an earlier token does to the KL of later ones included."""
    beta, table = 0.4, parameters()
    reference_NT = logps_of(parameters(1)).detach()

    def shaped(estimator: str) -> np.ndarray:
        kl_NT = kl_estimate(logps_of(table).detach(), reference_NT, estimator=estimator)
        return REWARDS - beta * (kl_NT * MASK_NT).sum(1).numpy()

    log_p_N, log_ref_N = of_completions(table), (reference_NT * MASK_NT).sum(1)
    objective = (log_p_N.exp() * (torch.tensor(REWARDS) - beta * (log_p_N - log_ref_N))).sum()
    truth = gradient(objective, table)
    for loss_type in ("reinforce", "rloo"):
        assert error(expected_gradient(loss_type, rewards_N=shaped("k1")), truth) < 1e-12
        for estimator in ("k2", "k3"):
            assert error(expected_gradient(loss_type, rewards_N=shaped(estimator)), truth) > 0.01


def kl_gradient(**options: float | str | bool) -> torch.Tensor:
    """Expected gradient of the KL penalty for one token of three, on-policy, by what it is in the loss."""
    logits_V = parameters()[0].detach().requires_grad_()
    reference_V = parameters(1)[0].detach().log_softmax(-1)
    logps_V = logits_V.log_softmax(-1)
    one, total = torch.ones(1, 1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for token in range(3):
        loss, _ = policy_loss(
            logps_V[token].reshape(1, 1),
            None,
            reference_V[token].reshape(1, 1),
            torch.zeros(1, dtype=torch.float64),
            one,
            Counts(1, 1, 1, 1),
            beta=1.0,
            **options,
        )
        total = total + logps_V[token].exp().detach() * loss
    return torch.autograd.grad(total, logits_V)[0]


def test_what_the_gradient_of_each_kl_estimator_is_expected_to_be() -> None:
    """By enumeration: the table of ``kl_estimate``."""
    logits_V = parameters()[0].detach().requires_grad_()
    reference_V = parameters(1)[0].detach().log_softmax(-1)
    logps_V = logits_V.log_softmax(-1)

    def of(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits_V, retain_graph=True)[0]

    reverse = of((logps_V.exp() * (logps_V - reference_V)).sum())
    forward = of((reference_V.exp() * (reference_V - logps_V)).sum())
    squared = of((logps_V.exp() * (logps_V - reference_V) ** 2 / 2).sum())
    assert error(forward, reverse) > 0.1
    assert float(kl_gradient(kl_estimator="k1").norm()) < 1e-15
    for expected, options in [
        (reverse, {"kl_estimator": "k2"}),
        (forward, {"kl_estimator": "k3"}),
        (reverse, {"kl_estimator": "k1", "use_bias_correction_kl": True}),
        (squared, {"kl_estimator": "k2", "use_bias_correction_kl": True}),
        (reverse, {"kl_estimator": "k3", "use_bias_correction_kl": True}),
    ]:
        assert error(kl_gradient(**options), expected) < 1e-12, options


def test_the_value_of_k1_and_k3_is_the_kl_on_average_and_k2_s_is_not() -> None:
    logps_V, reference_V = (parameters(seed)[0].detach().log_softmax(-1) for seed in (0, 1))
    kl = float((logps_V.exp() * (logps_V - reference_V)).sum())
    means = {
        k: float((logps_V.exp() * kl_estimate(logps_V, reference_V, estimator=k)).sum()) for k in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(kl)
    assert means["k3"] == pytest.approx(kl)
    assert means["k2"] != pytest.approx(kl, rel=0.01)


# --- completions of an older policy ---


STALE = 0.3  # how far the older policy is from the present one, on the way to an unrelated one


def expected_of_stale(*, old: str, mode: str, **options: float) -> torch.Tensor:
    """Minus the gradient of the loss expected where completions are of an older policy.

    ``old`` is the policy that the clip range is centred on: the one that is trained ("proximal"), or the sampler.
    """
    table = parameters()
    logps_NT, sampler_NT = logps_of(table), logps_of(table + STALE * (parameters(1) - table)).detach()
    chances_N = (sampler_NT * MASK_NT).sum(1).exp()
    weights = None
    if mode != "none":
        compared = (logps_NT.detach(), sampler_NT, MASK_NT)
        weights = importance_weights(*compared, mode=mode, clip_min=None, clip_max=1e9)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(OUTCOMES)):
        loss, _ = policy_loss(
            logps_NT[[n]],
            sampler_NT[[n]] if old == "sampler" else None,
            None,
            torch.tensor(REWARDS[[n]]),
            MASK_NT[[n]],
            constant_counts(MASK_NT[[n]]),
            weights_BT=None if weights is None else weights[[n]],
            loss_type="dapo",
            **options,
        )
        total = total + chances_N[n] * loss
    return -gradient(total, table)


def test_stale_completions_are_corrected_by_weights_whatever_the_clip_range() -> None:
    """The decoupled objective (AReaL, arXiv:2505.24298): a clip range around the policy that is trained, and a
    weight for the sampler. With a completion's weight there is no bias. With a token's there is the bias of PPO without
    a clip; PPO's clip range around the sampler adds a bias of its own, because tokens outside of it have no gradient.
    """
    truth, narrow, wide = true_gradient(), {"epsilon": 0.2}, {"epsilon": 0.999999, "epsilon_high": 1e9}
    assert error(expected_of_stale(old="proximal", mode="sequence_truncate", **narrow), truth) < 1e-12
    by_token = expected_of_stale(old="proximal", mode="token_truncate", **narrow)
    assert error(expected_of_stale(old="sampler", mode="none", **wide), by_token) < 1e-12
    assert error(expected_of_stale(old="sampler", mode="none", **narrow), by_token) > 0.1
    assert error(by_token, truth) < error(expected_of_stale(old="proximal", mode="none", **narrow), truth)
