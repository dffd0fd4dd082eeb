"""Distillation: each divergence beside plain loops, its slope beside autograd, and the expected gradient of the loss,
by enumeration, on the policy of ``test_bandit``, which says one token or two."""

from __future__ import annotations

import math

import pytest
import torch

from grpo.config import TeacherConfig
from grpo.losses import Counts, completed, distillation_loss, divergence_of, divergence_slope
from grpo.losses.distillation import LEAST_TAIL, later
from grpo.types import Batch
from tests.losses.test_bandit import (
    LENGTHS,
    MASK_NT,
    OUTCOMES,
    STALE,
    error,
    gradient,
    logps_of,
    of_completions,
    parameters,
)

KINDS = ["forward_kl", "reverse_kl", "jsd"]
BETA = 0.3


def distributions(seed: int = 0, rows: int = 4, V: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of student and teacher, (rows,V), float64."""
    g = torch.Generator().manual_seed(seed)
    first, second = (2 * torch.randn(rows, V, generator=g, dtype=torch.float64) for _ in range(2))
    return first.log_softmax(1), second.log_softmax(1)


def by_loops(q: list[float], p: list[float], kind: str) -> float:
    """Of one token, from probabilities."""
    total = 0.0
    for student, teacher in zip(q, p, strict=True):
        middle = BETA * teacher + (1 - BETA) * student
        if kind == "forward_kl" and teacher:
            total += teacher * math.log(teacher / student)
        if kind == "reverse_kl" and student:
            total += student * math.log(student / teacher)
        if kind == "jsd":
            total += BETA * teacher * math.log(teacher / middle) if teacher else 0.0
            total += (1 - BETA) * student * math.log(student / middle) if student else 0.0
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_and_its_slope(kind: str) -> None:
    log_q_NV, log_p_NV = distributions()
    (log_p_NV if kind == "forward_kl" else log_q_NV)[0, 2] = -torch.inf
    log_q_NV, log_p_NV = log_q_NV.log_softmax(1), log_p_NV.log_softmax(1)
    found_N = divergence_of(log_q_NV, log_p_NV, kind=kind, beta=BETA)
    loops = [by_loops(q.exp().tolist(), p.exp().tolist(), kind) for q, p in zip(log_q_NV, log_p_NV, strict=True)]
    torch.testing.assert_close(found_N, torch.tensor(loops, dtype=torch.float64))

    logits_NV = log_q_NV.clone().requires_grad_()
    divergence_of(logits_NV.log_softmax(1), log_p_NV, kind=kind, beta=BETA).sum().backward()
    slope_NV = divergence_slope(logits_NV.detach().log_softmax(1), log_p_NV, kind=kind, beta=BETA)
    torch.testing.assert_close(slope_NV[1:], logits_NV.grad[1:])  # of the first row, a probability is 0
    assert slope_NV.isfinite().all()
    assert float(slope_NV.sum(1).abs().max()) < 1e-12, "logits may be moved together"


def test_the_generalized_divergence_has_the_two_others_at_its_ends() -> None:
    """Divided by beta, it becomes the forward KL; by 1 - beta, the reverse one (GKD, section 3)."""
    log_q_NV, log_p_NV = distributions()
    for kind, beta, factor in (("forward_kl", 1e-6, 1e6), ("reverse_kl", 1 - 1e-6, 1e6)):
        at_the_end_N = divergence_of(log_q_NV, log_p_NV, kind="jsd", beta=beta) * factor
        torch.testing.assert_close(at_the_end_N, divergence_of(log_q_NV, log_p_NV, kind=kind), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_teacher_of_its_likeliest_tokens_is_compared_over_them_and_one_more(kind: str, k: int) -> None:
    """Value and gradient: of the coarser distributions, by loops and by autograd."""
    log_q_NV, log_p_NV = distributions(rows=5)
    ids_NK = log_p_NV.topk(k).indices
    ids_NK[4, 1:] = -1  # a row with one known token alone
    logits_NV = log_q_NV.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, ids in enumerate(ids_NK.tolist()):
        ids = [token for token in ids if token >= 0]
        q = logits_NV[row].log_softmax(0).exp()[ids]
        p = log_p_NV[row].exp()[ids]
        if len(ids) < 7:
            q, p = (torch.cat([x, (1 - x.sum())[None]]) for x in (q, p))
        found = divergence_of(q.log()[None], p.log()[None], kind=kind, beta=BETA)
        assert float(found) == pytest.approx(by_loops(q.tolist(), p.tolist(), kind), abs=1e-9)
        total = total + found.sum()
    total.backward()
    known_NK = torch.where(ids_NK >= 0, log_p_NV.gather(1, ids_NK.clamp(min=0)), 0.0)
    whole_NV = completed(log_q_NV, ids_NK, known_NK)
    ours = divergence_of(log_q_NV, whole_NV, kind=kind, beta=BETA).sum()
    torch.testing.assert_close(ours, total.detach(), atol=1e-6, rtol=1e-6)
    slope_NV = divergence_slope(log_q_NV, whole_NV, kind=kind, beta=BETA)
    torch.testing.assert_close(slope_NV, logits_NV.grad, atol=1e-6, rtol=1e-5)
    coarse_N, fine_N = (divergence_of(log_q_NV, p, kind=kind, beta=BETA) for p in (whole_NV, log_p_NV))
    assert (coarse_N <= fine_N + 1e-6).all(), "counting tokens together makes no difference up"


def test_a_teacher_whose_likeliest_tokens_round_to_one_still_has_a_tail() -> None:
    log_q_1V = torch.tensor([[0.5, 0.3, 0.2]]).log()
    whole_1V = completed(log_q_1V, torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.1 + 1e-4]]).log())
    assert float(whole_1V.exp()[0, 2]) == pytest.approx(LEAST_TAIL)
    assert divergence_of(log_q_1V, whole_1V, kind="reverse_kl").isfinite().all()


def test_what_comes_later() -> None:
    assert later(torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 0.0]])).tolist() == [[6.0, 4.0, 0.0], [3.0, 0.0, 0.0]]


# --- the expected gradient ---


def batch_of(
    outcomes: list[int], teacher_NT: torch.Tensor, old_NT: torch.Tensor | None = None, *, padding: float = math.nan
) -> Batch:
    nothing = torch.empty(0)
    mask_BT = MASK_NT[outcomes]
    return Batch(
        input_ids_RN=nothing,
        layout=None,
        completion_ids_BT=nothing,
        predicts_BT=nothing,
        completion_mask_BT=nothing,
        places_M=nothing,
        mask_BT=mask_BT,
        advantages=nothing,
        sampler_logps_BT=nothing,
        old_logps_BT=None if old_NT is None else old_NT[outcomes],
        teacher_logps_BT=torch.where(mask_BT > 0, teacher_NT[outcomes], padding),
    )


def divergences(table: torch.Tensor, teacher: torch.Tensor, kind: str = "reverse_kl") -> torch.Tensor:
    """Of every outcome's tokens, (7,2): of the first token's distribution, and of the second's after the first."""
    of_state_3 = divergence_of(table.log_softmax(-1), teacher.log_softmax(-1), kind=kind)
    second = [of_state_3.new_zeros(()) if len(y) == 1 else of_state_3[y[0]] for y in OUTCOMES]
    return torch.stack([torch.stack([of_state_3[0], there]) for there in second])


def expected(
    *, sampled: bool, whole_sequence: bool = False, kind: str = "reverse_kl", stale: float = 0.0
) -> torch.Tensor:
    """The gradient of the loss expected over all completions of the policy, or of an older one with its weights."""
    table, teacher = parameters(), parameters(2).detach()
    config = TeacherConfig(url="http://t", divergence=kind, whole_sequence=whole_sequence)
    logps_NT, teacher_NT = logps_of(table), logps_of(teacher)
    older_NT = logps_of(table + stale * (parameters(1) - table)).detach()
    divergence_NT = None if sampled else divergences(table, teacher, kind)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(OUTCOMES)):
        loss, _ = distillation_loss(
            logps_NT[[n]],
            batch_of([n], teacher_NT, older_NT if stale else None),
            Counts(1, 1, 1, 2),
            config,
            divergence_BT=None if divergence_NT is None else divergence_NT[[n]],
        )
        total = total + (older_NT * MASK_NT)[n].sum().exp() * loss
    return gradient(total, table)


def with_texts_before_held_fixed(stale: float = 0.0, kind: str = "reverse_kl") -> torch.Tensor:
    """Sum over the texts before a token, by the chance of coming to them, of the gradient of its divergence."""
    table, teacher = parameters(), parameters(2).detach()
    older = table.detach() + stale * (parameters(1).detach() - table.detach())
    chances = older.softmax(-1)[0]
    of_state_3 = divergence_of(table.log_softmax(-1), teacher.log_softmax(-1), kind=kind)
    return gradient(of_state_3[0] + chances[1] * of_state_3[1] + chances[2] * of_state_3[2], table)


def of_whole_completions() -> torch.Tensor:
    """The gradient of KL(student, teacher) over the seven completions."""
    table, teacher = parameters(), parameters(2).detach()
    log_q_N, log_p_N = of_completions(table), of_completions(teacher)
    return gradient((log_q_N.exp() * (log_q_N - log_p_N)).sum(), table)


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled tokens", "whole vocabulary"])
def test_a_token_s_own_divergence_has_the_gradient_with_the_texts_before_it_held_fixed(sampled: bool) -> None:
    found = expected(sampled=sampled)
    assert error(found, with_texts_before_held_fixed()) < 1e-12
    assert error(found, of_whole_completions()) > 0.02, "which is not that of whole completions"


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled tokens", "whole vocabulary"])
def test_whole_sequence_is_the_gradient_of_the_reverse_kl_of_completions(sampled: bool) -> None:
    assert error(expected(sampled=sampled, whole_sequence=True), of_whole_completions()) < 1e-12


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_any_divergence_may_be_taken_on_the_student_s_own_texts(kind: str) -> None:
    assert error(expected(sampled=False, kind=kind), with_texts_before_held_fixed(kind=kind)) < 1e-12


def test_of_an_older_policy_s_tokens_the_ratio_makes_the_present_policy_s() -> None:
    """Token by token: the texts before them are the older policy's."""
    for sampled in (True, False):
        assert error(expected(sampled=sampled, stale=STALE), with_texts_before_held_fixed(STALE)) < 1e-12
    assert error(with_texts_before_held_fixed(STALE), with_texts_before_held_fixed()) > 0.02


def test_its_value_is_the_kl_and_the_sampled_one_is_so_on_average() -> None:
    table, teacher = parameters().detach(), parameters(2).detach()
    config = TeacherConfig(url="http://t", divergence="reverse_kl")
    outcomes, tokens = list(range(len(OUTCOMES))), int(LENGTHS.sum())
    counts = Counts(tokens, len(OUTCOMES), 1, 2)
    batch = batch_of(outcomes, logps_of(teacher), padding=math.inf)
    loss, metrics = distillation_loss(logps_of(table), batch, counts, config)
    difference = (logps_of(table) - logps_of(teacher)) * MASK_NT
    assert float(loss) == pytest.approx(float(difference.sum()) / tokens)
    assert float(metrics["teacher/kl"]) == pytest.approx(float(difference.sum()))
    chances_N = of_completions(table).exp()
    kl = float((chances_N * (of_completions(table) - of_completions(teacher))).sum())
    assert float((chances_N[:, None] * divergences(table, teacher) * MASK_NT).sum()) == pytest.approx(kl)
    assert float((chances_N * difference.sum(1)).sum()) == pytest.approx(kl)


def test_it_is_the_same_in_several_micro_batches_and_weights_correct_for_the_sampler() -> None:
    table, teacher_NT = parameters(), logps_of(parameters(2).detach())
    config = TeacherConfig(url="http://t", divergence="reverse_kl", whole_sequence=True)
    counts, logps_NT = Counts(11, 7, 1, 2), logps_of(table)
    weights_NT = torch.linspace(0.5, 1.5, 14, dtype=torch.float64).reshape(7, 2)

    def of(rows: list[int]) -> torch.Tensor:
        batch = batch_of(rows, teacher_NT)
        return distillation_loss(logps_NT[rows], batch, counts, config, weights_BT=weights_NT[rows])[0]

    at_once = gradient(of(list(range(7))), table)
    table2 = parameters()
    logps_NT = logps_of(table2)
    torch.testing.assert_close(gradient(of([0, 3]) + of([1, 2, 4]) + of([5, 6]), table2), at_once)
    plain, _ = distillation_loss(logps_of(parameters()), batch_of([4], teacher_NT), counts, config)
    assert not math.isclose(float(plain), float(of([4])))
