"""The loss of one micro-batch, from its log-probabilities under policy, reference and sampler."""

from __future__ import annotations

from dataclasses import replace

import torch

from grpo.config import AlgorithmConfig, TeacherConfig
from grpo.losses import (
    Counts,
    distillation_loss,
    entropy_bonus,
    importance_metrics,
    importance_ratio,
    importance_weights,
    policy_loss,
)
from grpo.model.policy import Policy
from grpo.model.teacher import compared_with
from grpo.types import Batch


def micro_batch_loss(
    policy: Policy,
    batch: Batch,
    counts: Counts,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    entropy_coef: float,
    teacher: TeacherConfig | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's share of the step's loss, and its sums for the metrics."""
    if algorithm.kl_in_loss and batch.ref_logps_BT is None:
        batch = replace(batch, ref_logps_BT=policy.reference_logprobs(batch, temperature))
    compared = compared_with(policy, batch, temperature, teacher)
    logps_BT, entropy_BT, log_left_BT, divergence_BT = policy.statistics(
        batch, temperature, entropy_gradient=entropy_coef > 0, compared=compared
    )
    if policy.truncation:
        batch = replace(batch, sampler_logps_BT=comparable(batch, log_left_BT))
    weights_BT, sampling = _importance_sampling(batch, logps_BT, algorithm)
    loss, metrics = policy_loss(logps_BT, batch, counts, algorithm, weights_BT)
    if algorithm.has_entropy_bonus or teacher is not None:
        metrics["policy_loss"] = loss.detach()
    if algorithm.has_entropy_bonus:
        kept_BT = batch.mask_BT if batch.kept_BT is None else batch.mask_BT * batch.kept_BT
        metrics["entropy_of_bonus"] = (entropy_BT.detach() * kept_BT).sum()
        metrics["entropy_of_bonus/count"] = kept_BT.sum()
    if entropy_coef > 0:
        loss = loss - entropy_coef * entropy_bonus(entropy_BT, batch.mask_BT, batch.kept_BT, counts)
    if teacher is not None:
        known_BT = None if compared is None else divergence_BT
        distance, of_teacher = distillation_loss(
            logps_BT, batch, counts, teacher, divergence_BT=known_BT, weights_BT=weights_BT
        )
        loss, metrics = loss + teacher.coef * distance, metrics | of_teacher
    difference_BT = (logps_BT.detach() - batch.sampler_logps_BT).abs() * batch.mask_BT
    metrics["entropy"] = (entropy_BT.detach() * batch.mask_BT).sum()
    if batch.kept_BT is not None:
        metrics["kept_tokens"] = (batch.kept_BT * batch.mask_BT).sum()
    metrics["sampling/sampling_logp_difference/mean"] = difference_BT.sum()
    metrics["sampling/sampling_logp_difference/max"] = difference_BT.max()
    return loss, metrics | sampling


def comparable(batch: Batch, log_left_BT: torch.Tensor) -> torch.Tensor:
    """The sampler's log-probabilities under truncated sampling, made comparable with the trainer's, (B,T).

    With top-k, top-p or min-p the sampler's log-probabilities belong to the truncated, renormalized distribution, the
    trainer's to the full one. So this adds the log of the probability that truncation leaves of the trainer's
    distribution. Their ratio is then that of the renormalized distributions: 1 where engine and trainer agree. The
    trainer's distribution is the old policy's (``batch.log_left_BT``), or on-policy the current one (``log_left_BT``).
    """
    left_BT = log_left_BT.detach() if batch.log_left_BT is None else batch.log_left_BT
    return batch.sampler_logps_BT + left_BT


def _importance_sampling(
    batch: Batch, logps_BT: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The surrogate's weights that correct for the mismatch of sampler and trainer, and their metrics; None without."""
    mode = algorithm.importance_sampling_mode
    if mode is None or mode == "none":  # never None in a recipe: Recipe fills it in
        return None, {}
    old_logps_BT = logps_BT if batch.old_logps_BT is None else batch.old_logps_BT
    compared = (old_logps_BT, batch.sampler_logps_BT, batch.mask_BT)
    weights_BT = importance_weights(
        *compared,
        mode=mode,
        clip_min=algorithm.importance_sampling_clip_min,
        clip_max=algorithm.importance_sampling_clip_max,
    )
    ratio_BT = importance_ratio(*compared, mode=mode)
    return weights_BT, importance_metrics(ratio_BT, weights_BT, batch.mask_BT, mode=mode)
