"""Losses and importance weights against plain loops written from the formulas, their clips one by one, and what the
weights do to the expected gradient, by enumeration."""

from __future__ import annotations

import math

import pytest
import torch

from grpo.losses import (
    LOSSES,
    Counts,
    importance_metrics,
    importance_ratio,
    importance_weights,
    kl_estimate,
)
from tests.losses.calling import policy_loss

B, T, MAX_LENGTH = 5, 9, 12
CLIPPED = ["grpo", "dr_grpo", "dapo", "bnpo"]  # test_parity.py has the others' formulas
MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
WINDOW = {"clip_min": 0.6, "clip_max": 1.7}


def made(seed: int = 0) -> dict[str, torch.Tensor]:
    """Ragged, off-policy, with a masked sequence and a zero advantage."""
    g = torch.Generator().manual_seed(seed)
    lengths = [9, 1, 4, 6, 3]
    mask_BT = torch.tensor([[float(t < n) for t in range(T)] for n in lengths], dtype=torch.float64)
    mask_BT[4] = 0.0
    old_BT = -3 * torch.rand(B, T, generator=g, dtype=torch.float64)
    return {
        "logps_BT": old_BT + 0.4 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "old_logps_BT": old_BT,
        "ref_logps_BT": old_BT + 0.3 * torch.randn(B, T, generator=g, dtype=torch.float64),
        "advantages_B": torch.tensor([1.5, -0.7, 0.0, -2.0, 1.0], dtype=torch.float64),
        "mask_BT": mask_BT,
    }


def counts_of(mask_BT: torch.Tensor) -> Counts:
    return Counts(int(mask_BT.sum()), int((mask_BT.sum(1) > 0).sum()), 1, MAX_LENGTH)


def in_plain_loops(
    x: dict[str, torch.Tensor], loss_type: str, beta: float, low: float, high: float, delta, weights=None
) -> float:
    """The papers' formulas, token by token; ``weights[b][t]`` multiply the surrogate."""
    sequence_sums, lengths = [], []
    for b in range(B):
        tokens = [t for t in range(T) if x["mask_BT"][b, t] > 0]
        if not tokens:
            continue
        total = 0.0
        for t in tokens:
            logp, old, ref = (float(x[name][b, t]) for name in ("logps_BT", "old_logps_BT", "ref_logps_BT"))
            ratio, advantage = math.exp(logp - old), float(x["advantages_B"][b])
            clipped = min(max(ratio, 1 - low), 1 + high)
            if delta is not None:
                ratio = min(ratio, delta)
            total += -min(ratio * advantage, clipped * advantage) * (weights[b][t] if weights else 1.0)
            total += beta * (math.exp(ref - logp) - (ref - logp) - 1)
        sequence_sums.append(total)
        lengths.append(len(tokens))
    if loss_type == "grpo":
        return sum(s / n for s, n in zip(sequence_sums, lengths, strict=True)) / len(lengths)
    if loss_type == "dr_grpo":
        return sum(sequence_sums) / (len(lengths) * MAX_LENGTH)
    return sum(sequence_sums) / sum(lengths)  # dapo; bnpo with a single micro-batch


@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize(("beta", "delta"), [(0.0, None), (0.3, None), (0.3, 1.5)])
def test_agrees_with_plain_loops_in_value_and_gradient(loss_type: str, beta: float, delta: float | None) -> None:
    x = made()
    options = {"loss_type": loss_type, "beta": beta, "epsilon": 0.2, "epsilon_high": 0.28, "delta": delta}
    logps_BT = x["logps_BT"].clone().requires_grad_()
    loss, _ = policy_loss(**(x | {"logps_BT": logps_BT}), counts=counts_of(x["mask_BT"]), **options)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(in_plain_loops(x, loss_type, beta, 0.2, 0.28, delta), rel=1e-12)

    step = 1e-6
    for b, t in [(0, 0), (0, 8), (1, 0), (3, 2), (4, 1), (1, 5)]:
        up, down = dict(x), dict(x)
        bump = torch.zeros(B, T, dtype=torch.float64)
        bump[b, t] = step
        up["logps_BT"], down["logps_BT"] = x["logps_BT"] + bump, x["logps_BT"] - bump
        arguments = (loss_type, beta, 0.2, 0.28, delta)
        slope = (in_plain_loops(up, *arguments) - in_plain_loops(down, *arguments)) / (2 * step)
        assert float(logps_BT.grad[b, t]) == pytest.approx(slope, abs=1e-7)


def test_on_policy_is_the_policy_gradient() -> None:
    """Without old log-probabilities the ratio is 1 and the gradient -A / N at every token that counts."""
    x = made()
    logps_BT = x["logps_BT"].clone().requires_grad_()
    loss, metrics = policy_loss(
        logps_BT, None, None, x["advantages_B"], x["mask_BT"], counts_of(x["mask_BT"]), loss_type="dapo"
    )
    loss.backward()
    expected_BT = -x["advantages_B"][:, None] * x["mask_BT"] / x["mask_BT"].sum()
    torch.testing.assert_close(logps_BT.grad, expected_BT)
    assert metrics["clip_ratio/region"] == 0


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [
        (1.0, 1.3, False),  # already likelier than 1 + epsilon_high: no further push
        (1.0, 1.27, True),
        (1.0, 0.5, True),  # pulled back up however far below
        (-1.0, 0.7, False),  # already less likely than 1 - epsilon
        (-1.0, 0.85, True),
        (-1.0, 1.9, True),  # pushed down however far above, up to delta
        (-1.0, 2.1, False),
    ],
)
def test_each_clip_binds_where_it_should(advantage: float, ratio: float, moves: bool) -> None:
    logps_BT = torch.tensor([[math.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, _ = policy_loss(
        logps_BT,
        torch.zeros(1, 1),
        None,
        torch.tensor([advantage]),
        one,
        Counts(1, 1, 1, 1),
        epsilon=0.2,
        epsilon_high=0.28,
        delta=2.0,
    )
    loss.backward()
    assert (float(logps_BT.grad) != 0) is moves


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_lies_under_the_mask_does_not_matter(loss_type: str) -> None:
    x = made()
    outcomes = []
    for filler in (0.0, float("nan"), float("-inf")):
        hidden = x["mask_BT"] == 0
        y = {k: v.masked_fill(hidden, filler) if k.endswith("logps_BT") else v for k, v in x.items()}
        loss, _ = policy_loss(**y, counts=counts_of(x["mask_BT"]), loss_type=loss_type, beta=0.1)
        outcomes.append(float(loss))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_nan_at_a_token_that_counts_is_not_hidden() -> None:
    x = made()
    x["logps_BT"][0, 0] = float("nan")
    loss, _ = policy_loss(**x, counts=counts_of(x["mask_BT"]))
    assert math.isnan(float(loss))


def test_an_enormous_ratio_stays_finite() -> None:
    x = made()
    x["old_logps_BT"] = x["logps_BT"] - 500
    loss, _ = policy_loss(**x, counts=counts_of(x["mask_BT"]))
    assert math.isfinite(float(loss))


def test_kl_is_never_negative_and_zero_at_equality() -> None:
    d = torch.linspace(-5, 5, 101)
    assert (kl_estimate(torch.zeros_like(d), d) >= 0).all()
    assert kl_estimate(torch.tensor(0.3), torch.tensor(0.3)) == 0


def sampler_logps(x: dict[str, torch.Tensor], filler: float = 0.0, seed: int = 1) -> torch.Tensor:
    """Not quite the trainer's, and ``filler`` where nothing counts."""
    noise_BT = torch.randn(B, T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x["old_logps_BT"] + 0.5 * noise_BT).masked_fill(x["mask_BT"] == 0, filler)


def weights_in_plain_loops(x: dict[str, torch.Tensor], sampler_BT: torch.Tensor, mode: str) -> list[list[float]]:
    """Token by token; 0 where the mask is."""
    level, bound = mode.split("_")
    weights = [[0.0] * T for _ in range(B)]
    for b in range(B):
        tokens = [t for t in range(T) if x["mask_BT"][b, t] > 0]
        log_ratios = {t: float(x["old_logps_BT"][b, t] - sampler_BT[b, t]) for t in tokens}
        for t in tokens:
            ratio = math.exp(log_ratios[t] if level == "token" else sum(log_ratios.values()))
            if bound == "truncate":
                ratio = min(max(ratio, WINDOW["clip_min"]), WINDOW["clip_max"])
            elif not WINDOW["clip_min"] <= ratio <= WINDOW["clip_max"]:
                ratio = 0.0
            weights[b][t] = ratio
    return weights


@pytest.mark.parametrize("mode", MODES)
def test_importance_weights_agree_with_plain_loops(mode: str) -> None:
    seen = set()
    for seed in range(5):
        x = made(seed)
        sampler_BT = sampler_logps(x, seed=seed)
        found_BT = importance_weights(x["old_logps_BT"], sampler_BT, x["mask_BT"], mode=mode, **WINDOW)
        expected_BT = torch.tensor(weights_in_plain_loops(x, sampler_BT, mode), dtype=torch.float64)
        torch.testing.assert_close(found_BT * x["mask_BT"], expected_BT, rtol=1e-12, atol=0)
        ratio_BT = importance_ratio(x["old_logps_BT"], sampler_BT, x["mask_BT"], mode=mode)
        counted_N = ratio_BT[x["mask_BT"] > 0]
        seen |= {"below"} if (counted_N < 0.6).any() else set()
        seen |= {"above"} if (counted_N > 1.7).any() else set()
        seen |= {"inside"} if ((counted_N > 0.6) & (counted_N < 1.7)).any() else set()
    assert seen == {"below", "above", "inside"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loss_type", CLIPPED)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_weighted_loss_agrees_with_plain_loops_in_value_and_gradient(mode: str, loss_type: str, beta: float) -> None:
    x = made()
    sampler_BT = sampler_logps(x)
    weights_BT = importance_weights(x["old_logps_BT"], sampler_BT, x["mask_BT"], mode=mode, **WINDOW)
    logps_BT = x["logps_BT"].clone().requires_grad_()
    loss, _ = policy_loss(
        **(x | {"logps_BT": logps_BT}),
        counts=counts_of(x["mask_BT"]),
        loss_type=loss_type,
        beta=beta,
        weights_BT=weights_BT,
    )
    loss.backward()
    arguments = (loss_type, beta, 0.2, 0.2, None, weights_in_plain_loops(x, sampler_BT, mode))
    assert float(loss.detach()) == pytest.approx(in_plain_loops(x, *arguments), rel=1e-12)

    step = 1e-6
    for b, t in [(0, 0), (0, 3), (0, 8), (1, 0), (3, 2), (4, 1), (1, 5)]:
        bump = torch.zeros(B, T, dtype=torch.float64)
        bump[b, t] = step
        up, down = (x | {"logps_BT": x["logps_BT"] + sign * bump} for sign in (1, -1))
        slope = (in_plain_loops(up, *arguments) - in_plain_loops(down, *arguments)) / (2 * step)
        assert float(logps_BT.grad[b, t]) == pytest.approx(slope, abs=1e-7)


def on_policy_gradient(
    x: dict[str, torch.Tensor], sampler_BT: torch.Tensor | None = None, mode: str = "", beta: float = 0.0
) -> torch.Tensor:
    """With one update a rollout: the old log-probabilities are the current ones, also for the weights."""
    logps_BT = x["logps_BT"].clone().requires_grad_()
    weights_BT = None
    if sampler_BT is not None:
        weights_BT = importance_weights(logps_BT, sampler_BT, x["mask_BT"], mode=mode, **WINDOW)
    counts = counts_of(x["mask_BT"])
    loss, _ = policy_loss(
        logps_BT, None, x["ref_logps_BT"], x["advantages_B"], x["mask_BT"], counts, beta=beta, weights_BT=weights_BT
    )
    loss.backward()
    return logps_BT.grad


@pytest.mark.parametrize("mode", MODES)
def test_weights_carry_no_gradient(mode: str) -> None:
    """They are made of the current log-probabilities, yet the gradient is -w A / N."""
    x = made()
    sampler_BT = sampler_logps(x | {"old_logps_BT": x["logps_BT"]})
    loops_BT = torch.tensor(weights_in_plain_loops(x | {"old_logps_BT": x["logps_BT"]}, sampler_BT, mode)).double()
    expected_BT = -loops_BT * x["advantages_B"][:, None] / x["mask_BT"].sum()
    torch.testing.assert_close(on_policy_gradient(x, sampler_BT, mode), expected_BT, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_agrees_changes_nothing(mode: str) -> None:
    x = made()
    assert torch.equal(on_policy_gradient(x, x["logps_BT"], mode), on_policy_gradient(x))


def test_a_mask_takes_the_gradient_but_not_the_kl_penalty() -> None:
    x = made()
    sampler_BT = x["logps_BT"].clone()
    sampler_BT[0, 3] -= 1.0  # ratio e
    sampler_BT[3, 1] += 1.0  # ratio 1/e
    plain_BT = on_policy_gradient(x)
    by_token_BT, by_sequence_BT = plain_BT.clone(), plain_BT.clone()
    by_token_BT[0, 3] = by_token_BT[3, 1] = 0.0
    by_sequence_BT[0] = by_sequence_BT[3] = 0.0
    assert plain_BT[0, 3] != 0
    assert plain_BT[3, 1] != 0
    assert torch.equal(on_policy_gradient(x, sampler_BT, "token_mask"), by_token_BT)
    assert torch.equal(on_policy_gradient(x, sampler_BT, "sequence_mask"), by_sequence_BT)
    kl_alone_BT = on_policy_gradient(x, beta=0.3) - plain_BT
    with_kl_BT = on_policy_gradient(x, sampler_BT, "sequence_mask", beta=0.3)
    torch.testing.assert_close(with_kl_BT, by_sequence_BT + kl_alone_BT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), float("-inf")])
def test_what_the_sampler_says_under_the_mask_does_not_matter(mode: str, filler: float) -> None:
    x = made()
    assert torch.equal(
        on_policy_gradient(x, sampler_logps(x, filler), mode), on_policy_gradient(x, sampler_logps(x), mode)
    )
    logps_BT = x["old_logps_BT"].masked_fill(x["mask_BT"] == 0, filler)
    ratio_BT = importance_ratio(logps_BT, sampler_logps(x, filler), x["mask_BT"], mode=mode)
    assert torch.equal(ratio_BT, importance_ratio(x["old_logps_BT"], sampler_logps(x), x["mask_BT"], mode=mode))
    assert ratio_BT.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_nan_of_the_sampler_at_a_token_that_counts_is_not_hidden(mode: str) -> None:
    x = made()
    sampler_BT = sampler_logps(x)
    sampler_BT[0, 0] = float("nan")
    assert on_policy_gradient(x, sampler_BT, mode).isnan().any()


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_far_away_gives_a_bounded_ratio(mode: str) -> None:
    x = made()
    for shift, bound in [(-500.0, math.exp(20)), (500.0, math.exp(-20)), (float("-inf"), math.exp(20))]:
        ratio_BT = importance_ratio(x["old_logps_BT"], x["old_logps_BT"] + shift, x["mask_BT"], mode=mode)
        counted_N = ratio_BT[x["mask_BT"] > 0]
        torch.testing.assert_close(counted_N, torch.full_like(counted_N, bound))


def test_importance_metrics_are_of_the_raw_ratio() -> None:
    """Two completions of two tokens and one, and one that does not count; the largest may be below 1, which is what
    padding's ratio is."""
    mask_BT = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    sampler_BT = -torch.tensor([[9.0, 4.0, 0.5], [9.0, 0.25, 9.0], [0.01, 9.0, 9.0]]).log()
    name = "sampling/importance_sampling_ratio"

    def found(mode: str, factor: float = 1.0) -> dict[str, float]:
        given = (torch.zeros(3, 3), sampler_BT - math.log(factor), mask_BT)
        weights_BT = importance_weights(*given, mode=mode, clip_min=0.1, clip_max=3.0)
        metrics = importance_metrics(importance_ratio(*given, mode=mode), weights_BT, mask_BT, mode=mode)
        return {key.removeprefix(f"{name}/"): pytest.approx(float(value)) for key, value in metrics.items()}

    clipped = "sampling/importance_sampling_clipped"
    by_token = {"min": 0.25, "max": 4.0, "mean": 4.75, "squares": 16.3125, "count": 3, clipped: 1}
    by_sequence = {"min": 0.25, "max": 2.0, "mean": 2.25, "squares": 4.0625, "count": 2, clipped: 0}
    for bound in ("truncate", "mask"):
        assert by_token == found(f"token_{bound}")
        assert by_sequence == found(f"sequence_{bound}")
        assert found(f"token_{bound}", 0.2)["max"] == 0.8
        assert found(f"sequence_{bound}", 0.2)["max"] == 0.08


def expected_gradient(mode: str | None, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Minus the gradient of the loss, expected under another sampler, and the gradient of the expected reward.

    The policy is a table of logits, a row for each token before (0 at the start), over V tokens; the expectation is the
    sum over all completions of ``length`` tokens.
    """
    V, g = 4, torch.Generator().manual_seed(3)
    table_VV = torch.randn(V, V, generator=g, dtype=torch.float64).requires_grad_()
    sampler_VV = table_VV.detach() + 0.7 * torch.randn(V, V, generator=g, dtype=torch.float64)
    completions_NT = torch.cartesian_prod(*[torch.arange(V)] * length).reshape(-1, length)
    rewards_N = torch.randn(len(completions_NT), generator=g, dtype=torch.float64)
    before_NT = torch.cat([torch.zeros(len(completions_NT), 1, dtype=torch.long), completions_NT[:, :-1]], 1)
    logps_NT = table_VV.log_softmax(-1)[before_NT, completions_NT]
    sampler_NT = sampler_VV.log_softmax(-1)[before_NT, completions_NT]
    mask_NT = torch.ones_like(logps_NT)
    weights_NT = None
    if mode is not None:
        weights_NT = importance_weights(logps_NT, sampler_NT, mask_NT, mode=mode, clip_min=None, clip_max=1e6)
    # The loss is linear in the advantage, so probabilities of completions can be put there; Counts() divide by 1.
    chances_N = sampler_NT.sum(1).exp()
    loss, _ = policy_loss(
        logps_NT, None, None, chances_N * rewards_N, mask_NT, Counts(1, 1, 1, 1), weights_BT=weights_NT
    )
    (pushed_VV,) = torch.autograd.grad(-loss, table_VV, retain_graph=True)
    (wanted_VV,) = torch.autograd.grad((logps_NT.sum(1).exp() * rewards_N).sum(), table_VV)
    return pushed_VV, wanted_VV


@pytest.mark.parametrize(
    ("mode", "length", "unbiased"),
    [
        ("token_truncate", 1, True),
        ("sequence_truncate", 1, True),
        (None, 1, False),
        # From two tokens on a token's own ratio leaves out how likely its neighbours were.
        ("token_truncate", 2, False),
        ("sequence_truncate", 2, True),
        ("sequence_mask", 3, True),
        (None, 2, False),
    ],
)
def test_under_another_sampler_the_expected_gradient_is_the_policy_s(
    mode: str | None, length: int, unbiased: bool
) -> None:
    pushed_VV, wanted_VV = expected_gradient(mode, length)
    error = float((pushed_VV - wanted_VV).norm() / wanted_VV.norm())
    assert error < 1e-12 if unbiased else error > 0.05
