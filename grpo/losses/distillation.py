"""Distillation: how far the student's distribution is from its teacher's at a token, and the loss made of that.

p is the teacher's distribution of a token given those before it, q the student's, both at the same temperature:

    forward_kl  KL(p || q) = sum p (log p - log q)                      (Hinton et al. 2015)
    reverse_kl  KL(q || p) = sum q (log q - log p)                      (MiniLLM, arXiv:2306.08543)
    jsd         b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q  (GKD, arXiv:2306.13649, eq. 3)

A teacher that is known by its k likeliest tokens alone is completed: all other tokens count as one (``completed``).
Nothing here holds more than the rows that it is given.
"""

from __future__ import annotations

import math

import torch

from grpo.config import TeacherConfig
from grpo.losses.tokens import MAX_LOG_RATIO, Counts
from grpo.types import Batch

LEAST_TAIL = 1e-7  # of the teacher's probability: what float32 leaves of 1 - sum of its likeliest tokens


def divergence_of(log_q_NV: torch.Tensor, log_p_NV: torch.Tensor, *, kind: str, beta: float = 0.5) -> torch.Tensor:
    """The divergence of each of N tokens, (N,), in nats, from log-probabilities."""
    if kind == "forward_kl":
        return _expected(log_p_NV, log_p_NV - log_q_NV)
    if kind == "reverse_kl":
        return _expected(log_q_NV, log_q_NV - log_p_NV)
    if kind == "jsd":
        log_m_NV = _mixture(log_q_NV, log_p_NV, beta)
        of_teacher_N = _expected(log_p_NV, log_p_NV - log_m_NV)
        return beta * of_teacher_N + (1 - beta) * _expected(log_q_NV, log_q_NV - log_m_NV)
    raise ValueError(f"kind is 'forward_kl', 'reverse_kl' or 'jsd', not {kind!r}")


def divergence_slope(log_q_NV: torch.Tensor, log_p_NV: torch.Tensor, *, kind: str, beta: float = 0.5) -> torch.Tensor:
    """The derivative of ``divergence_of`` by the student's logits (divided by the temperature), (N,V).

    forward_kl: q - p. Else q (g - sum q g), with g the derivative by q: log q - log p of the reverse KL,
    (1 - b) (log q - log m) of jsd. For a ``completed`` teacher this is the derivative of the divergence between the
    coarser distributions: within the tail, teacher and student have the same shape by definition.
    """
    q_NV = log_q_NV.exp()
    if kind == "forward_kl":
        return q_NV - log_p_NV.exp()
    if kind == "reverse_kl":
        slope_NV = log_q_NV - log_p_NV
    elif kind == "jsd":
        slope_NV = (1 - beta) * (log_q_NV - _mixture(log_q_NV, log_p_NV, beta))
    else:
        raise ValueError(f"kind is 'forward_kl', 'reverse_kl' or 'jsd', not {kind!r}")
    slope_NV = torch.where(q_NV > 0, slope_NV, 0.0)
    return q_NV * (slope_NV - (q_NV * slope_NV).sum(1, keepdim=True))


def completed(log_q_NV: torch.Tensor, ids_NK: torch.Tensor, log_p_NK: torch.Tensor) -> torch.Tensor:
    """The teacher's log-probabilities (N,V), where those of K tokens alone are known: log p of these.

    The rest of its probability, P = 1 - sum of the K, is laid over the other tokens in the student's proportions,
    log P - log Q + log q with Q the student's probability of all of these. Any of the divergences is then that between
    the K tokens and one more, "another token", of probability P and Q: a lower bound of the whole one (information is
    lost by counting tokens together, none is made up), with its own exact gradient. P is at least ``LEAST_TAIL``.
    Places of ``ids_NK`` below 0 are empty, but never the first of a row.
    """
    empty_NK = ids_NK < 0
    places_NK = torch.where(empty_NK, ids_NK[:, :1], ids_NK)
    log_p_NK = log_p_NK.masked_fill(empty_NK, -torch.inf)
    p_tail_N1 = (1 - log_p_NK.double().exp().sum(1, keepdim=True)).clamp(min=LEAST_TAIL).float()
    # Of the student's own tail as it is summed, not as 1 - sum: a tail of 1e-9 has a shape too.
    known_NV = torch.zeros_like(log_q_NV, dtype=torch.bool).scatter(1, places_NK, True)
    log_q_tail_N1 = log_q_NV.masked_fill(known_NV, -torch.inf).logsumexp(1, keepdim=True)
    tail_NV = log_q_NV + (p_tail_N1.log() - log_q_tail_N1)
    log_p_NV = torch.full_like(log_q_NV, -torch.inf).scatter_reduce(1, places_NK, log_p_NK, "amax")
    return torch.where(known_NV, log_p_NV, tail_NV)


def distillation_loss(
    logps_BT: torch.Tensor,
    batch: Batch,
    counts: Counts,
    teacher: TeacherConfig,
    *,
    divergence_BT: torch.Tensor | None = None,
    weights_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's share of the step's mean divergence (a scalar, without ``coef``), and sums for the metrics.

    With ``divergence_BT``, D of each token over the vocabulary and with gradient, a token contributes D. Without it the
    teacher is known by ``batch.teacher_logps_BT`` alone, and a token y contributes the policy gradient of its own log
    q(y) - log p(y), an estimate of the reverse KL without bias: sg(w d) r with d = log q - log p and r = q / q_old
    (Lu et al. 2025, thinkingmachines.ai/blog/on-policy-distillation: the advantage is -d). w are ``weights_BT``, which
    correct for the sampler.

    With ``whole_sequence`` a token also answers for what comes after it: + sg(w R) r, R the sum of D (or d) over the
    completion's later tokens. The gradient is then that of the reverse KL of whole completions (MiniLLM,
    arXiv:2306.08543, eq. 3 to 5), else that of the tokens' KLs with the texts before them held fixed.
    """
    mask_BT = batch.mask_BT
    valid_BT = mask_BT > 0
    if divergence_BT is None:
        assert batch.teacher_logps_BT is not None, "what the teacher says of the sampled tokens"
        difference_BT = logps_BT.detach() - batch.teacher_logps_BT
        value_BT = torch.where(valid_BT, difference_BT, 0.0)
    else:
        value_BT = torch.where(valid_BT, divergence_BT, 0.0)
    answered_BT = torch.zeros_like(mask_BT) if divergence_BT is not None else value_BT
    if teacher.whole_sequence:
        answered_BT = answered_BT + later(value_BT.detach())
    loss_BT = value_BT if divergence_BT is not None else torch.zeros_like(value_BT)
    if divergence_BT is None or teacher.whole_sequence:
        old_BT = logps_BT.detach() if batch.old_logps_BT is None else batch.old_logps_BT
        log_ratio_BT = torch.where(valid_BT, logps_BT - old_BT, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        surrogate_BT = answered_BT * log_ratio_BT.exp()
        loss_BT = loss_BT + (surrogate_BT if weights_BT is None else surrogate_BT * weights_BT)
    metrics = {"teacher/kl": (value_BT.detach() * mask_BT).sum()}
    return (loss_BT * mask_BT).sum() / max(counts.tokens, 1), metrics


def later(values_BT: torch.Tensor) -> torch.Tensor:
    """The sum of a row's values behind each place, (B,T)."""
    return values_BT.flip(1).cumsum(1).flip(1) - values_BT


def _expected(log_weights_NV: torch.Tensor, values_NV: torch.Tensor) -> torch.Tensor:
    """Sum of exp(log_weights) values; a token of probability 0 counts 0, whatever its value."""
    weights_NV = log_weights_NV.exp()
    return torch.where(weights_NV > 0, weights_NV * values_NV, 0.0).sum(1)


def _mixture(log_q_NV: torch.Tensor, log_p_NV: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log(1 - beta))
