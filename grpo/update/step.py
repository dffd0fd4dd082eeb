"""One optimizer step from scored sequences: count, plan, forward, backward, check, step.

The gradient is that of the whole step's loss whatever the number of micro-batches or processes: denominators are
counted over everything before the first backward; each process's loss is multiplied by the world size, because wrappers
average gradients over processes; gradients synchronize on the last micro-batch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch

from grpo.config import AlgorithmConfig, Recipe, TrainingConfig
from grpo.errors import RunError
from grpo.losses import (
    Counts,
    LossOptions,
    entropy_bonus,
    find_loss,
    importance_metrics,
    importance_ratio,
    importance_weights,
    kl_estimate,
    next_entropy_control,
    policy_loss,
)
from grpo.model.policy import Policy
from grpo.types import Batch, Group, Sequence, Status
from grpo.update.forward import plan_for, score_sequences, select_tokens, selects_tokens
from grpo.update.micro_batch_size import fitting, within_memory

RATIO = "sampling/importance_sampling_ratio"


def to_sequences(groups: list[Group], advantages_PG: list[list[float]], algorithm: AlgorithmConfig) -> list[Sequence]:
    """Flatten scored groups. Unscorable completions and, if so configured, truncated ones are not valid: they count
    neither in the loss nor in its denominators."""
    sequences = []
    for group, advantages_G in zip(groups, advantages_PG, strict=True):
        for completion, reward, advantage in zip(group.completions, group.rewards, advantages_G, strict=True):
            masked = algorithm.mask_truncated_completions and completion.status is Status.LENGTH
            sequences.append(
                Sequence(
                    prompt_ids=group.prompt.token_ids,
                    completion_ids=completion.token_ids,
                    sampler_logprobs=completion.sampler_logprobs,
                    advantage=advantage,
                    valid=reward is not None and not masked and completion.status is not Status.ERROR,
                )
            )
    return sequences


def with_signal(sequences: list[Sequence], algorithm: AlgorithmConfig) -> list[Sequence]:
    """The sequences that can change the gradient: a zero advantage contributes only through the KL penalty, the entropy
    bonus, or a loss type that says so."""
    regardless = algorithm.kl_in_loss or algorithm.has_entropy_bonus or find_loss(algorithm.loss_type).without_advantage
    return [s for s in sequences if s.valid and (s.advantage != 0 or regardless)]


def less_kl(
    rewards_PG: np.ndarray, policy: Policy, groups: list[Group], recipe: Recipe
) -> tuple[np.ndarray, dict[str, float]]:
    """With ``kl_in_reward``: the rewards less beta times the completion's KL, and the mean KL of a token.

    The KL is the sum over the completion's tokens of ``kl_estimate``, of the policy before the update
    (arXiv:2402.14740, and TRL's RLOOTrainer). REINFORCE++ (arXiv:2501.03262) gives a token only the KL of those
    after it: the same expected gradient, with less variance. Without ``kl_in_reward`` the rewards are as they were.
    """
    algorithm = recipe.algorithm
    if not (algorithm.kl_in_reward and algorithm.beta > 0):
        return rewards_PG, {}
    sequences = to_sequences(groups, np.zeros(rewards_PG.shape).tolist(), algorithm)
    places = [i for i, s in enumerate(sequences) if s.completion_ids and not np.isnan(rewards_PG.flat[i])]
    scored = score_sequences(
        policy,
        [sequences[i] for i in places],
        recipe.training,
        temperature=recipe.rollout.temperature,
        reference=True,
    )
    kl_PG = np.zeros(rewards_PG.shape)
    for i, scores in zip(places, scored, strict=True):
        logps_T, ref_logps_T = torch.tensor(scores.logprobs), torch.tensor(scores.ref_logprobs)
        kl_PG.flat[i] = float(kl_estimate(logps_T, ref_logps_T, estimator=algorithm.kl_estimator).double().sum())
    tokens = sum(len(scores.logprobs) for scores in scored)
    return rewards_PG - algorithm.beta * kl_PG, {"kl": float(kl_PG.sum()) / max(tokens, 1)}


def optimizer_step(
    policy: Policy,
    sequences: list[Sequence],
    algorithm: AlgorithmConfig,
    training: TrainingConfig,
    *,
    temperature: float,
    learning_rate: float,
    max_completion_length: int,
    dump_to: Path,
) -> dict[str, float]:
    """Backward through ``sequences`` (those of all processes, the same list on each) and one step of the optimizer.

    Returns metrics, equal on every process. Where no sequence carries signal nothing is stepped (AdamW's momentum would
    move the weights without a gradient) and ``{"skipped": 1}`` returned. Raises RunError on every process, before the
    optimizer's step, where loss or gradient is not finite; the batch is then in ``dump_to``.
    """
    valid = [s for s in sequences if s.valid]
    if not with_signal(valid, algorithm):
        return {"skipped": 1.0}
    if selects_tokens(algorithm):
        options = loss_options(algorithm)
        valid = select_tokens(policy, valid, algorithm, training, options, temperature=temperature)
    contributing = with_signal(valid, algorithm)

    def attempt(max_tokens: int) -> tuple[dict[str, float], float]:
        plan = plan_for(policy, contributing, training, max_tokens)
        counts = Counts(
            tokens=sum(len(s.completion_ids) for s in valid),
            sequences=len(valid),
            micro_batches=sum(any(s.weight for s in micro_batch) for share in plan for micro_batch in share),
            max_completion_length=max_completion_length,
            kept=int(sum(sum(s.kept) for s in valid if s.kept)) if selects_tokens(algorithm) else None,
        )

        def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return _micro_batch_loss(policy, batch, counts, algorithm, temperature)

        return backward(policy, plan[policy.accelerator.process_index], loss_of, dump_to)

    totals, norm = within_memory(policy, training, attempt)
    policy.step(learning_rate)
    metrics = _metrics(totals, norm)
    if algorithm.has_entropy_bonus:
        metrics["entropy_coef"] = _move_entropy_control(policy, algorithm, metrics["entropy_of_bonus"])
    return metrics


def loss_options(algorithm: AlgorithmConfig) -> LossOptions:
    """The numbers in the losses' formulas, from the keys of the same names."""
    return LossOptions(**{field.name: getattr(algorithm, field.name) for field in fields(LossOptions)})


def _entropy_coef(policy: Policy, algorithm: AlgorithmConfig) -> float:
    """What the entropy bonus counts in this update."""
    if algorithm.use_adaptive_entropy:
        return policy.entropy_control.applied(algorithm.entropy_target)
    return algorithm.entropy_coef


def _move_entropy_control(policy: Policy, algorithm: AlgorithmConfig, entropy: float) -> float:
    """After an update: the adaptive coefficient for the next one; the fixed one stays."""
    if not algorithm.use_adaptive_entropy:
        return algorithm.entropy_coef
    policy.entropy_control = next_entropy_control(
        policy.entropy_control,
        entropy,
        target=algorithm.entropy_target,
        delta=algorithm.entropy_coef_delta,
        low=algorithm.entropy_coef_min,
        high=algorithm.entropy_coef_max,
    )
    return policy.entropy_control.coef


def backward(
    policy: Policy,
    micro_batches: list[list[Sequence]],
    loss_of: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    dump_to: Path,
) -> tuple[dict[str, float], float]:
    """Accumulate the gradient of the sum of ``loss_of`` over all processes' micro-batches, and clip it.

    ``loss_of`` gives a micro-batch's share of the step's loss and its sums for the metrics. Returns those summed over
    micro-batches and processes (the smallest of names that end in ``/min``, the largest of ``/max``), ``loss`` among
    them, and the gradient's norm before clipping. Raises RunError on every process where either is not finite, and
    DoesNotFit where memory runs out.
    """
    accelerator = policy.accelerator
    sums: dict[str, torch.Tensor] = {}
    for i, micro_batch in enumerate(micro_batches):
        sync = nullcontext() if i == len(micro_batches) - 1 else policy.no_sync()
        with fitting(policy, micro_batch), sync:
            loss, metrics = loss_of(policy.collate(micro_batch))
            (loss * accelerator.num_processes).backward()
        for name, value in ({"loss": loss.detach()} | metrics).items():
            value = value.double()
            sums[name] = _combined(name, torch.stack([sums[name], value])) if name in sums else value
    totals = _over_processes(policy, sums)
    norm = policy.clip_gradients()
    if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
        _stop_before_step(policy, micro_batches, totals["loss"], norm, dump_to)
    return totals, norm


def _micro_batch_loss(
    policy: Policy, batch: Batch, counts: Counts, algorithm: AlgorithmConfig, temperature: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ref_logps_BT = batch.ref_logps_BT
    if algorithm.kl_in_loss and ref_logps_BT is None:
        ref_logps_BT = policy.reference_logprobs(batch, temperature)
    coef = _entropy_coef(policy, algorithm)
    logps_BT, entropy_BT, log_left_BT = policy.statistics(batch, temperature, entropy_gradient=coef > 0)
    sampler_logps_BT = comparable(policy, batch, log_left_BT)
    weights_BT, sampling = _importance_sampling(batch, logps_BT, sampler_logps_BT, algorithm)
    loss, metrics = policy_loss(
        logps_BT,
        batch.old_logps_BT,
        ref_logps_BT,
        batch.advantages_B,
        batch.mask_BT,
        counts,
        loss_type=algorithm.loss_type,
        beta=algorithm.beta if algorithm.kl_in_loss else 0.0,
        kl_estimator=algorithm.kl_estimator,
        use_bias_correction_kl=algorithm.use_bias_correction_kl,
        importance_sampling_level=algorithm.importance_sampling_level,
        weights_BT=weights_BT,
        kept_BT=batch.kept_BT,
        sampler_logps_BT=sampler_logps_BT,
        off_policy_mask_threshold=algorithm.off_policy_mask_threshold,
        **asdict(loss_options(algorithm)),
    )
    if algorithm.has_entropy_bonus:
        kept_BT = batch.mask_BT if batch.kept_BT is None else batch.mask_BT * batch.kept_BT
        metrics["policy_loss"] = loss.detach()
        metrics["entropy_of_bonus"] = (entropy_BT.detach() * kept_BT).sum()
        metrics["entropy_of_bonus/count"] = kept_BT.sum()
    if coef > 0:
        loss = loss - coef * entropy_bonus(entropy_BT, batch.mask_BT, batch.kept_BT, counts)
    difference_BT = (logps_BT.detach() - sampler_logps_BT).abs() * batch.mask_BT
    metrics["entropy"] = (entropy_BT.detach() * batch.mask_BT).sum()
    if batch.kept_BT is not None:
        metrics["kept_tokens"] = (batch.kept_BT * batch.mask_BT).sum()
    metrics["sampling/sampling_logp_difference/mean"] = difference_BT.sum()
    metrics["sampling/sampling_logp_difference/max"] = difference_BT.max()
    return loss, metrics | sampling


def comparable(policy: Policy, batch: Batch, log_left_BT: torch.Tensor) -> torch.Tensor:
    """The sampler's log-probabilities as they compare with the trainer's.

    With top-k, top-p or min-p the sampler's are of what those leave, renormalized; the trainer's of the whole
    distribution. Adding the log of what the trainer's own distribution leaves makes both of the whole one, so that the
    ratio is that of the renormalized ones: 1 where engine and trainer agree. ``precompute_logprobs`` has added it where
    there are old log-probabilities.
    """
    if not policy.truncation or batch.old_logps_BT is not None:
        return batch.sampler_logps_BT
    return batch.sampler_logps_BT + log_left_BT.detach()


def _importance_sampling(
    batch: Batch, logps_BT: torch.Tensor, sampler_logps_BT: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The surrogate's weights (B,T) against the mismatch of sampler and trainer, and their metrics; None without."""
    mode = algorithm.importance_sampling_mode
    if mode is None or mode == "none":  # a recipe's is never None: Recipe fills it in
        return None, {}
    old_logps_BT = logps_BT if batch.old_logps_BT is None else batch.old_logps_BT
    compared = (old_logps_BT, sampler_logps_BT, batch.mask_BT)
    weights_BT = importance_weights(
        *compared,
        mode=mode,
        clip_min=algorithm.importance_sampling_clip_min,
        clip_max=algorithm.importance_sampling_clip_max,
    )
    ratio_BT = importance_ratio(*compared, mode=mode)
    return weights_BT, importance_metrics(ratio_BT, weights_BT, batch.mask_BT, mode=mode)


def _combined(name: str, values_N: torch.Tensor) -> torch.Tensor:
    """One value of a metric from those of N parts of the step: by its name's end the smallest, the largest, or the sum.

    A part with nothing to measure (padding) gives inf, 0 and 0.
    """
    return {"min": torch.amin, "max": torch.amax}.get(name.rpartition("/")[2], torch.sum)(values_N)


def _over_processes(policy: Policy, sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The same over processes. Every process has the same names, padding micro-batches included."""
    names = sorted(sums)
    every_WN = policy.accelerator.gather(torch.stack([sums[name].double() for name in names])[None])
    return {name: float(_combined(name, column_W)) for name, column_W in zip(names, every_WN.unbind(1), strict=True)}


def _metrics(totals: dict[str, float], norm: float) -> dict[str, float]:
    """Means over tokens of what was summed over tokens; what brings a ``/count`` is over that."""
    tokens = max(totals.pop("tokens"), 1.0)
    counts = {name.removesuffix("/count"): totals.pop(name) for name in list(totals) if name.endswith("/count")}
    metrics = {"loss": totals.pop("loss"), "grad_norm": norm}
    metrics |= {name: totals.pop(name) for name in ("policy_loss",) if name in totals}
    squares = totals.pop(f"{RATIO}/squares", None)
    for name, total in totals.items():
        if name.endswith(("/min", "/max")):
            metrics[name] = total
        else:
            mean = total / max(counts.get(name.removesuffix("/mean"), tokens), 1.0)
            metrics[f"{name}_mean" if name.startswith("clip_ratio/") else name] = mean
    if squares is not None:
        square, mean = squares / max(counts[RATIO], 1.0), metrics[f"{RATIO}/mean"]
        metrics[f"{RATIO}/std"] = math.sqrt(max(square - mean**2, 0.0))
        metrics["sampling/effective_sample_size"] = min(mean**2 / square, 1.0) if square > 0 else 0.0
    return metrics


def _stop_before_step(
    policy: Policy, micro_batches: list[list[Sequence]], loss: float, norm: float, dump_to: Path
) -> None:
    rank = policy.accelerator.process_index
    path = dump_to / f"nonfinite_rank_{rank}.pt"
    torch.save([[asdict(s) for s in micro_batch] for micro_batch in micro_batches], path)
    policy.accelerator.wait_for_everyone()
    raise RunError(
        f"rank {rank}: the loss is {loss} and the gradient norm {norm}: stopped before the optimizer's step, so "
        f"the weights are the last step's. The batch is in {path}. Usual causes: a learning rate too high, sampler "
        "log-probabilities of -inf, or bfloat16 overflow; resume from the last checkpoint with a lower "
        "optimizer.learning_rate"
    )
