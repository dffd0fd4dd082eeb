"""What holds for every loss whatever the numbers: splitting, padding and order do not matter, no advantage no gradient,
and each bound binds where it should. And losses of the user's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.config import AlgorithmConfig
from grpo.errors import UserError
from grpo.losses import (
    Counts,
    EntropyControl,
    StepTokens,
    find_loss,
    next_entropy_control,
    top_entropy_kept,
)
from grpo.losses.covariance import clip_cov_selection, kl_cov_selection
from tests.losses.calling import policy_loss
from tests.parity.cases import B, Case, Problem, T, cases
from tests.parity.ours import gradient_of, our_loss, posed

CASES = {case.name: case for case in cases()}
SPLITS = [[[0], [1, 2, 3, 4, 5]], [[5, 0, 3], [1], [2, 4]], [[i] for i in range(B)]]


def whole_gradient(case: Case) -> tuple[torch.Tensor, float]:
    return gradient_of(our_loss, posed(case))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("bnpo")])
def test_micro_batches_do_not_matter(name: str) -> None:
    expected, value = whole_gradient(CASES[name])
    for rows in SPLITS:
        found, split_value = gradient_of(our_loss, replace(posed(CASES[name]), rows=rows))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        assert split_value == pytest.approx(value, rel=1e-12)


def test_they_matter_to_bnpo_alone() -> None:
    expected, _ = whole_gradient(CASES["bnpo"])
    found, _ = gradient_of(our_loss, replace(posed(CASES["bnpo"]), rows=SPLITS[0]))
    assert float((found - expected).norm()) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_order_does_not_matter(name: str) -> None:
    expected, _ = whole_gradient(CASES[name])
    order = [3, 5, 0, 1, 4, 2]
    problem = posed(CASES[name])
    x = {key: value[order] for key, value in problem.x.items()}
    weights, kept_BT = (None if value is None else value[order] for value in (problem.weights, problem.kept_BT))
    found, _ = gradient_of(our_loss, Problem(problem.case, x, weights, kept_BT))
    here_BT = problem.x["mask_BT"] > 0
    back = torch.argsort(torch.tensor(order))
    for part, part_expected in zip(found.chunk(2), expected.chunk(2), strict=True):
        table_BT = torch.zeros(B, T, dtype=torch.float64).masked_scatter(x["mask_BT"] > 0, part)
        torch.testing.assert_close(table_BT[back][here_BT], part_expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("filler", [float("nan"), float("-inf"), 3.0])
def test_padding_does_not_matter(name: str, filler: float) -> None:
    """Two more columns, and whatever may lie under the mask."""
    problem = posed(CASES[name])
    expected, value = gradient_of(our_loss, problem)
    x = dict(problem.x)
    for key in ("logps_BT", "old_logps_BT", "ref_logps_BT", "sampler_logps_BT"):
        hidden_BT = x[key].masked_fill(x["mask_BT"] == 0, filler)
        x[key] = torch.cat([hidden_BT, torch.full((B, 2), filler, dtype=torch.float64)], 1)
    wider = {key: torch.cat([x[key], torch.zeros(B, 2, dtype=torch.float64)], 1) for key in ("mask_BT", "entropies_BT")}
    weights, kept_BT = (
        value if value is None or value.shape[1] == 1 else torch.cat([value, torch.ones(B, 2, dtype=torch.float64)], 1)
        for value in (problem.weights, problem.kept_BT)
    )
    found, wider_value = gradient_of(our_loss, Problem(problem.case, x | wider, weights, kept_BT))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert wider_value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if "KL" not in name and "kl_cov" not in name])
def test_zero_advantage_gives_zero_gradient(name: str) -> None:
    """To rows 2 and 3; the entropy bonus is for all."""
    case = replace(CASES[name], options={k: v for k, v in CASES[name].options.items() if k != "beta"}, entropy_coef=0.0)
    problem = posed(case)
    logps_BT = problem.x["logps_BT"].clone().requires_grad_()
    our_loss(problem, logps_BT, problem.x["entropies_BT"]).backward()
    assert not logps_BT.grad[2:4].any()
    assert logps_BT.grad.any()


def slope(advantage: float, log_ratios: list[float], loss_type: str, **options: float | str | None) -> torch.Tensor:
    """Gradient of one sequence's loss by its log-probabilities."""
    logps_BT = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    one_BT = torch.ones_like(logps_BT)
    counts = Counts(len(log_ratios), 1, 1, len(log_ratios))
    loss, _ = policy_loss(
        logps_BT,
        torch.zeros_like(one_BT),
        None,
        torch.tensor([advantage]).double(),
        one_BT,
        counts,
        loss_type=loss_type,
        **options,
    )
    loss.backward()
    return logps_BT.grad[0]


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
@pytest.mark.parametrize("loss_type", ["gspo", "dapo", "grpo", "luspo"])
def test_the_sequence_s_ratio_decides_not_the_token_s(loss_type: str, level: str) -> None:
    options = {"importance_sampling_level": level, "epsilon": 0.2}
    inside, outside = [math.log(3.0), math.log(0.35)], [math.log(1.5), math.log(1.1)]  # means 1.02 and 1.28
    assert slope(1.0, inside, loss_type, **options).all()
    assert not slope(1.0, outside, loss_type, **options).any()
    assert slope(-1.0, outside, loss_type, **options).all()


def test_rloo_clips_the_product() -> None:
    assert slope(1.0, [math.log(1.09)] * 2, "rloo", epsilon=0.2).all()  # 1.19
    assert not slope(1.0, [math.log(1.1)] * 2, "rloo", epsilon=0.2).any()  # 1.21
    assert not slope(-1.0, [math.log(0.89)] * 2, "rloo", epsilon=0.2).any()


def test_cispo_bounds_the_weight_and_never_the_gradient_s_being() -> None:
    for ratio in (0.1, 1.0, 4.9, 5.1, 50.0):
        expected = -min(ratio, 5.0) * 0.7
        assert float(slope(0.7, [math.log(ratio)], "cispo")) == pytest.approx(expected)
        assert float(slope(0.7, [math.log(ratio)], "cispo", epsilon_high=2.0)) == pytest.approx(-min(ratio, 2.0) * 0.7)


@pytest.mark.parametrize(("advantage", "tau"), [(1.0, 1.0), (-1.0, 1.05)])
def test_sapo_fades_on_both_sides_of_1_and_stops_nowhere(advantage: float, tau: float) -> None:
    at_1 = float(slope(advantage, [0.0], "sapo"))
    assert at_1 == pytest.approx(-advantage)
    for ratio in (0.3, 3.0):
        gate = 4 / (2 + math.exp(tau * (ratio - 1)) + math.exp(-tau * (ratio - 1)))  # 4 sigmoid (1 - sigmoid)
        found = float(slope(advantage, [math.log(ratio)], "sapo"))
        assert found == pytest.approx(-advantage * ratio * gate)
        assert 0 < gate < 1


def test_vespo_weighs_the_completion_s_ratio_and_most_at_k_over_lambda() -> None:
    weights = {w: float(-slope(1.0, [math.log(w)], "vespo")) for w in (0.05, 0.5, 2 / 3, 0.8, 1.0, 8.0)}
    assert weights[1.0] == pytest.approx(1.0)
    assert max(weights, key=weights.__getitem__) == 2 / 3
    assert weights[8.0] < 1e-6
    halves = slope(1.0, [math.log(0.5)] * 2, "vespo") * 2  # two tokens, so that each counts half
    torch.testing.assert_close(
        halves, torch.full((2,), float(slope(1.0, [math.log(0.25)], "vespo")), dtype=torch.float64)
    )


def test_off_policy_masking_takes_bad_and_unlikely_sequences_alone() -> None:
    def found(advantage: float, drift: float) -> bool:
        logps_BT = torch.full((1, 2), -1.0, requires_grad=True)
        loss, metrics = policy_loss(
            logps_BT,
            None,
            None,
            torch.tensor([advantage]),
            torch.ones(1, 2),
            Counts(2, 1, 1, 2),
            sampler_logps_BT=torch.tensor([[-1.0, -1.0 + 2 * drift]]),  # its mean counts
            off_policy_mask_threshold=0.5,
        )
        loss.backward()
        assert float(metrics["off_policy_masked"]) == (0.0 if logps_BT.grad.any() else 2.0)
        return bool(logps_BT.grad.any())

    assert [found(a, d) for a in (-1.0, 1.0) for d in (0.4, 0.6, -5.0)] == [True, False, True, True, True, True]


def step_tokens(number: int = 400) -> StepTokens:
    g = torch.Generator().manual_seed(0)
    logps_M, advantages_M = -2 * torch.rand(number, generator=g), torch.randn(number, generator=g)
    return StepTokens(logps_M, 0.3 * torch.randn(number, generator=g), torch.rand(number, generator=g), advantages_M)


def test_covariance_selections_take_their_share() -> None:
    step, draw = step_tokens(), torch.Generator().manual_seed(3)
    cov_M = (step.logps_M - step.logps_M.mean()) * (step.advantages_M - step.advantages_M.mean())
    options = AlgorithmConfig.model_construct(kl_cov_ratio=0.05, clip_cov_ratio=0.05, clip_cov_lb=0.3, clip_cov_ub=0.9)
    kl_selected = kl_cov_selection(step, options, draw) == 0
    assert int(kl_selected.sum()) == 20
    assert cov_M[kl_selected].min() > cov_M[~kl_selected].max()
    clip_selected = clip_cov_selection(step, options, draw) == 0
    assert int(clip_selected.sum()) == 20
    assert cov_M[clip_selected].min() > 0.3
    assert cov_M[clip_selected].max() < 0.9
    assert not torch.equal(clip_selected, clip_cov_selection(step, options, draw) == 0)  # another draw
    nothing = options.model_copy(update={"clip_cov_lb": 90.0, "clip_cov_ub": 91.0})
    assert clip_cov_selection(step, nothing, draw).all()


def test_clip_cov_takes_the_gradient_and_kl_cov_adds_a_pull_to_the_old_policy() -> None:
    kept_BT = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    ratios = [math.log(1.1), math.log(1.1)]
    assert slope(1.0, ratios, "clip_cov", kept_BT=kept_BT).tolist() == [pytest.approx(-0.55), 0.0]
    # -r A / 2 and + coefficient / 2, the sign of the log-ratio
    assert slope(1.0, ratios, "kl_cov", kept_BT=kept_BT, ppo_kl_coef=0.4).tolist() == pytest.approx([-0.55, -0.35])
    assert slope(1.0, [0.5, 0.5], "kl_cov").all()  # far outside of a clip range that it has not


@pytest.mark.parametrize("quantile", [0.2, 0.5, 1.0])
def test_top_entropy_keeps_its_share(quantile: float) -> None:
    entropies_M = step_tokens().entropies_M
    kept_M = top_entropy_kept(entropies_M, quantile) == 1
    assert int(kept_M.sum()) == round(400 * quantile)
    assert quantile == 1.0 or entropies_M[kept_M].min() > entropies_M[~kept_M].max()
    assert int(top_entropy_kept(entropies_M, 0.0).sum()) == 1


def test_the_adaptive_coefficient_follows_the_entropy_within_its_bounds() -> None:
    control, seen = EntropyControl(0.01), []
    assert control.applied(0.5) == 0.0  # nothing measured yet
    for entropy in (0.7, 0.5, 0.4, 0.4, 0.6):
        control = next_entropy_control(control, entropy, target=0.5, delta=0.02, low=0.0, high=0.03)
        seen.append((round(control.coef, 9), round(control.applied(0.5), 9)))
    assert seen == [(0.0, 0.0), (0.02, 0.02), (0.03, 0.03), (0.03, 0.03), (0.01, 0.0)]


OWN = """
from grpo.losses import loss
from grpo.losses.tokens import by_tokens, token_sum

@loss(reduce=token_sum, denominator=by_tokens)
def bounded(tokens, options):
    return -tokens.ratio_BT.clamp(max=1 + options.high) * tokens.advantages_B1

def plain(tokens, options):
    return tokens.ratio_BT
"""


def test_a_loss_in_a_file_of_the_user_s_own(tmp_path: Path) -> None:
    file = tmp_path / "my_losses.py"
    file.write_text(OWN)
    assert find_loss(f"{file}:bounded").reduce.__name__ == "token_sum"
    assert float(slope(2.0, [0.0], f"{file}:bounded")) == -2.0
    assert float(slope(2.0, [0.1], f"{file}:bounded", epsilon_high=0.05)) == 0.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dappo", "did you mean dapo"),
        ("{}/my_losses.py:plain", "not decorated by @loss"),
        ("{}/my_losses.py:absent", "has no 'absent'"),
        ("{}/other.py:bounded", "there is no file"),
        ("no.such.module:bounded", "ModuleNotFoundError: No module named 'no'"),
    ],
)
def test_a_loss_that_is_not_there_is_said_in_words(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "my_losses.py").write_text(OWN)
    with pytest.raises(UserError, match=rf"algorithm\.loss_type: .*{said}"):
        find_loss(name.format(tmp_path))
