"""Losses against plain loops written from the formulas, and their clips one by one."""

from __future__ import annotations

import math

import pytest
import torch

from grpo.losses import LOSSES, Counts, kl_k3, policy_loss

B, T, MAX_LENGTH = 5, 9, 12


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


def in_plain_loops(x: dict[str, torch.Tensor], loss_type: str, beta: float, low: float, high: float, delta) -> float:
    """The papers' formulas, token by token."""
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
            total += -min(ratio * advantage, clipped * advantage)
            total += beta * (math.exp(ref - logp) - (ref - logp) - 1)
        sequence_sums.append(total)
        lengths.append(len(tokens))
    if loss_type == "grpo":
        return sum(s / n for s, n in zip(sequence_sums, lengths, strict=True)) / len(lengths)
    if loss_type == "dr_grpo":
        return sum(sequence_sums) / (len(lengths) * MAX_LENGTH)
    return sum(sequence_sums) / sum(lengths)  # dapo; bnpo with a single micro-batch


@pytest.mark.parametrize("loss_type", LOSSES)
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
    assert (kl_k3(torch.zeros_like(d), d) >= 0).all()
    assert kl_k3(torch.tensor(0.3), torch.tensor(0.3)) == 0
