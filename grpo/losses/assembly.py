"""One micro-batch's share of the step's policy loss: ratio, objective, weights, KL penalty, reduction, denominator."""

from __future__ import annotations

import torch

from grpo.config import AlgorithmConfig
from grpo.losses.kl import kl_estimate
from grpo.losses.registry import find_loss
from grpo.losses.sampler import off_policy_kept
from grpo.losses.tokens import MAX_LOG_RATIO, Counts, Tokens
from grpo.types import Batch


def policy_ratio(log_ratio_BT: torch.Tensor, mask_BT: torch.Tensor, *, level: str) -> torch.Tensor:
    """The ratio pi / pi_old of the surrogates, (B,T), with gradient.

    token            exp(log_ratio) of each token
    sequence         s = exp(mean of log_ratio over the sequence's tokens), at each of them (GSPO, arXiv:2507.18071,
                     eq. 7)
    sequence_token   sg(s) pi / sg(pi): the value is s, the gradient that of the token alone (GSPO-token, eq. 14)
    """
    if level != "token":
        mean_B1 = (log_ratio_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1.0)
        if level == "sequence_token":
            log_ratio_BT = mean_B1.detach() + log_ratio_BT - log_ratio_BT.detach()
        elif level == "sequence":
            log_ratio_BT = mean_B1.expand_as(log_ratio_BT)
        else:
            raise ValueError(f"level is 'token', 'sequence' or 'sequence_token', not {level!r}")
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def policy_loss(
    logps_BT: torch.Tensor,
    batch: Batch,
    counts: Counts,
    algorithm: AlgorithmConfig,
    weights_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One micro-batch's share of the step's loss, and sums for the metrics.

    Args:
        logps_BT: log-probabilities of the tokens under the policy being trained, with gradient; nats.
        batch: always ``mask_BT`` and ``advantages``. Where needed, ``old_logps_BT``, under the policy that the clip
            range is centred on (None: on-policy, so the ratio is 1 and its gradient is that of the log-probability);
            ``ref_logps_BT``, under the reference; ``kept_BT``, 0 at tokens that a selection excludes from the
            surrogate; ``sampler_logps_BT``, for ``off_policy_mask_threshold``.
        counts: tokens and sequences of the whole optimizer step.
        algorithm: the loss type and its hyperparameters.
        weights_BT: factors on the surrogate, not on the KL penalty, and not counted in the denominator; finite
            everywhere. They come from ``importance_weights``. None means 1.

    Returns:
        The loss (a scalar; summed over micro-batches and processes it is the step's loss) and, detached, sums over this
        micro-batch's tokens: ``tokens``, ``kl``, and what the loss type measures.
    """
    variant, mask_BT = find_loss(algorithm.loss_type), batch.mask_BT
    # Padding may hold anything, inf and nan included: multiply by the mask only what is finite.
    valid_BT = mask_BT > 0
    logps_BT = torch.where(valid_BT, logps_BT, 0.0)
    old_BT = logps_BT.detach() if batch.old_logps_BT is None else torch.where(valid_BT, batch.old_logps_BT, 0.0)
    log_ratio_BT = logps_BT - old_BT
    ratio_BT = policy_ratio(log_ratio_BT, mask_BT, level=algorithm.importance_sampling_level or variant.level)
    tokens = Tokens(logps_BT, log_ratio_BT, ratio_BT, batch.advantages, mask_BT, weights_BT, batch.kept_BT)

    loss_BT = variant.objective(tokens, algorithm)
    if weights_BT is not None and not variant.weighs_sampler:
        loss_BT = loss_BT * weights_BT
    if batch.kept_BT is not None and not variant.applies_kept:
        loss_BT = loss_BT * batch.kept_BT
    metrics = {"tokens": mask_BT.sum()} | variant.measure(tokens, algorithm)
    if algorithm.off_policy_mask_threshold is not None:
        on_policy_B1 = off_policy_kept(
            tokens.advantages_B1,
            logps_BT,
            batch.sampler_logps_BT,
            mask_BT,
            threshold=algorithm.off_policy_mask_threshold,
        )
        loss_BT = loss_BT * on_policy_B1
        metrics["off_policy_masked"] = ((1 - on_policy_B1) * mask_BT).sum()
    if algorithm.kl_in_loss:
        assert batch.ref_logps_BT is not None, "the KL penalty compares with ref_logps_BT"
        ref_BT = torch.where(valid_BT, batch.ref_logps_BT, 0.0)
        kl_BT = kl_estimate(logps_BT, ref_BT, estimator=algorithm.kl_estimator)
        metrics["kl"] = (kl_BT.detach() * mask_BT).sum()
        loss_BT = loss_BT + algorithm.beta * (kl_BT * ratio_BT if algorithm.use_bias_correction_kl else kl_BT)
    return variant.reduce(loss_BT, mask_BT) / max(variant.denominator(counts), 1), metrics
