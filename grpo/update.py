"""One optimizer step from scored sequences: count, plan, forward, backward, check, step.

The gradient is that of the whole step's loss whatever the number of micro-batches or processes: denominators are
counted over everything before the first backward; each process's loss is multiplied by the world size, because wrappers
average gradients over processes; gradients synchronize on the last micro-batch only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate.utils import gather_object

from grpo.config import AlgorithmConfig, TrainingConfig
from grpo.errors import RunError
from grpo.losses import Counts, importance_metrics, importance_ratio, importance_weights, policy_loss
from grpo.micro_batch_size import fitting, within_memory
from grpo.packing import MicroBatch, plan_micro_batches
from grpo.policy import Policy
from grpo.types import Batch, Group, Sequence, Status


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
    """The sequences that can change the gradient: a zero advantage contributes only through the KL penalty."""
    return [s for s in sequences if s.valid and (s.advantage != 0 or algorithm.beta > 0)]


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
    contributing = with_signal(sequences, algorithm)
    if not contributing:
        return {"skipped": 1.0}
    valid = [s for s in sequences if s.valid]

    def attempt(max_tokens: int) -> tuple[dict[str, float], float]:
        plan = plan_for(policy, contributing, training, max_tokens)
        counts = Counts(
            tokens=sum(len(s.completion_ids) for s in valid),
            sequences=len(valid),
            micro_batches=sum(any(s.weight for s in micro_batch) for share in plan for micro_batch in share),
            max_completion_length=max_completion_length,
        )

        def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return _micro_batch_loss(policy, batch, counts, algorithm, temperature)

        return backward(policy, plan[policy.accelerator.process_index], loss_of, dump_to)

    totals, norm = within_memory(policy, training, attempt)
    policy.step(learning_rate)
    return _metrics(totals, norm)


def plan_for(
    policy: Policy, sequences: list[Sequence], training: TrainingConfig, max_tokens: int
) -> list[list[MicroBatch]]:
    """Every process's micro-batches, as this policy computes them."""
    return plan_micro_batches(
        sequences,
        max_tokens=max_tokens,
        max_sequences=training.micro_batch_size,
        world_size=policy.accelerator.num_processes,
        packed=policy.packed,
    )


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
    if algorithm.beta > 0 and ref_logps_BT is None:
        ref_logps_BT = policy.reference_logprobs(batch, temperature)
    logps_BT, entropy_BT = policy.logprobs(batch, temperature)
    weights_BT, sampling = _importance_sampling(batch, logps_BT, algorithm)
    loss, metrics = policy_loss(
        logps_BT,
        batch.old_logps_BT,
        ref_logps_BT,
        batch.advantages_B,
        batch.mask_BT,
        counts,
        loss_type=algorithm.loss_type,
        beta=algorithm.beta,
        epsilon=algorithm.epsilon,
        epsilon_high=algorithm.epsilon_high,
        delta=algorithm.delta,
        weights_BT=weights_BT,
    )
    difference_BT = (logps_BT.detach() - batch.sampler_logps_BT).abs() * batch.mask_BT
    metrics["entropy"] = (entropy_BT * batch.mask_BT).sum()
    metrics["sampling/sampling_logp_difference/mean"] = difference_BT.sum()
    metrics["sampling/sampling_logp_difference/max"] = difference_BT.max()
    return loss, metrics | sampling


def _importance_sampling(
    batch: Batch, logps_BT: torch.Tensor, algorithm: AlgorithmConfig
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    """The surrogate's weights (B,T) against the mismatch of sampler and trainer, and their metrics; None without."""
    mode = algorithm.importance_sampling_mode
    if mode is None or mode == "none":  # a recipe's is never None: Recipe fills it in
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
    """Means over tokens of what was summed over tokens; a ``/mean`` that brings a ``/count`` is over that."""
    tokens = max(totals.pop("tokens"), 1.0)
    counts = {name.removesuffix("/count"): totals.pop(name) for name in list(totals) if name.endswith("/count")}
    metrics = {"loss": totals.pop("loss"), "grad_norm": norm}
    for name, total in totals.items():
        if name.endswith(("/min", "/max")):
            metrics[name] = total
        else:
            mean = total / max(counts.get(name.removesuffix("/mean"), tokens), 1.0)
            metrics[f"{name}_mean" if name.startswith("clip_ratio/") else name] = mean
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


@torch.no_grad()
def precompute_logprobs(
    policy: Policy, sequences: list[Sequence], training: TrainingConfig, *, temperature: float, reference: bool
) -> list[Sequence]:
    """The sequences with the rollout policy's log-probabilities (and the reference's), for several updates a rollout.

    Work is split over processes like an update; every process gets all results back.
    """
    place_of = {id(s): i for i, s in enumerate(sequences)}

    def attempt(max_tokens: int) -> list[tuple[int, list[float], list[float] | None]]:
        found = []
        for micro_batch in plan_for(policy, sequences, training, max_tokens)[policy.accelerator.process_index]:
            with fitting(policy, micro_batch):
                batch = policy.collate(micro_batch)
                logps_BT = policy.logprobs(batch, temperature)[0]
                ref_logps_BT = policy.reference_logprobs(batch, temperature) if reference else None
            for row, s in enumerate(micro_batch):
                if s.weight == 0:
                    continue
                span = slice(len(s.completion_ids))
                ref = ref_logps_BT[row, span].tolist() if ref_logps_BT is not None else None
                found.append((place_of[id(s)], logps_BT[row, span].tolist(), ref))
        return found

    result = list(sequences)
    for i, old, ref in gather_object(within_memory(policy, training, attempt)):
        result[i] = replace(sequences[i], old_logprobs=old, ref_logprobs=ref)
    return result
