"""The optimizer steps made from a rollout: count, plan, forward, backward, check, step.

The gradient is that of the whole step's loss whatever the number of micro-batches or processes: denominators are
counted over everything before the first backward; each process's loss is multiplied by the world size, because
gradients are averaged over processes. Sharded ones are reduced in every micro-batch, so that no process holds all of
them; whole ones after the last, when all processes know that every micro-batch fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch

from grpo.config import Recipe
from grpo.errors import RunError, first_line
from grpo.losses import Counts, EntropyControl, find_loss, next_entropy_control
from grpo.packing import MicroBatch, to_sequences
from grpo.run.run import Run
from grpo.types import Batch, Group, TrainedSequence
from grpo.update.experts import StepExperts
from grpo.update.forward import plan_for, precompute_logprobs, select_tokens, selects_tokens, with_sampler_as_old
from grpo.update.loss import micro_batch_loss
from grpo.update.metrics import combined, over_processes, step_metrics
from grpo.update.micro_batch_size import within_memory, work_through

MOST_UNCOUNTED = 0.05  # share of a step's tokens that a sampler may give no log-probability of

LossOf = Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def update(run: Run, groups: list[Group], advantages: np.ndarray, learning_rate: float) -> list[dict[str, float]]:
    """``num_iterations`` passes over the rollout in ``num_minibatches`` optimizer steps each; metrics of every step.
    ``advantages`` are (P,G), or (P,G,U) with one for each turn.

    With a single optimizer step the policy that sampled is the policy being updated: its old log-probabilities are the
    current ones, and no forward pass is spent on them. Those of a replayed group are always the sampler's.
    """
    algorithm = run.recipe.algorithm
    check_staleness(groups, run.progress.step, run.recipe.rollout.max_staleness)
    sequences = taught(run, to_sequences(groups, advantages, algorithm, scored=run.recipe.learns_from_rewards))
    uncounted = check_uncounted(sequences, run.progress.step)
    if algorithm.num_iterations * algorithm.num_minibatches > 1 or any(group.replayed for group in groups):
        needed = [s for s in sequences if s.valid] if selects_tokens(algorithm) else with_signal(sequences, run.recipe)
        sequences = precompute_logprobs(run, sequences, reference=algorithm.kl_in_loss, needed=needed)
        sequences = with_sampler_as_old(sequences, groups)
    size = len(sequences) // algorithm.num_minibatches
    updates = [
        optimizer_step(run, sequences[start : start + size], learning_rate)
        for _ in range(algorithm.num_iterations)
        for start in range(0, len(sequences), size)
    ]
    return [metrics | uncounted for metrics in updates]


def check_uncounted(sequences: list[TrainedSequence], step: int) -> dict[str, float]:
    """How many tokens do not count because the sampler gave no finite log-probability, as a metric; empty for none.

    Raises RunError where they are too many to be chance.
    """
    count, tokens = sum(len(s.uncounted) for s in sequences), sum(s.num_model_tokens for s in sequences)
    if not count:
        return {}
    if count > MOST_UNCOUNTED * tokens:
        raise RunError(
            f"step {step}: the sampler gave {count} of {tokens} tokens no finite log-probability (nan or -inf). A few "
            f"are left out of the loss; more than {MOST_UNCOUNTED:.0%} mean that the engine computes wrongly: an "
            "overflow of its type (rollout.vllm_dtype=float32 shows whether), or broken weights or kernels"
        )
    return {"sampling/nan_logprobs": float(count)}


def check_staleness(groups: list[Group], step: int, most: int) -> None:
    """Raise RunError where a token of ``groups`` is of a policy more than ``most`` versions older than the one that
    ``step`` trains, or of a later one. Replayed groups are older by the recipe's wish."""
    for group in groups:
        for span in (span for completion in group.completions for span in completion.versions):
            if not group.replayed and not step - most <= span.version <= step:
                raise RunError(
                    f"prompt {group.prompt.id}: tokens {span.start} to {span.end} of a completion are of policy "
                    f"version {span.version}, and version {step} is trained; rollout.max_staleness is {most}"
                )


def optimizer_step(run: Run, sequences: list[TrainedSequence], learning_rate: float) -> dict[str, float]:
    """Backward through ``sequences`` (those of all processes, the same list on each) and one step of the optimizer.

    Returns metrics, equal on every process. Where no sequence carries signal nothing is stepped (AdamW's momentum would
    move the weights without a gradient) and ``{"skipped": 1}`` returned. Raises RunError on every process, before the
    optimizer's step, where loss or gradient is not finite; the batch is then in the run's folder.
    """
    policy, algorithm, rollout = run.policy, run.recipe.algorithm, run.recipe.rollout
    valid = [s for s in sequences if s.valid]
    if not with_signal(valid, run.recipe):
        return {"skipped": 1.0}
    if selects_tokens(algorithm):
        valid = select_tokens(run, valid)
    contributing = with_signal(valid, run.recipe)
    entropy_coef = _entropy_coef(run)

    def attempt(max_tokens: int) -> tuple[StepExperts, dict[str, float], float]:
        experts = StepExperts(policy, algorithm)
        plan = plan_for(policy, contributing, run.recipe.training, max_tokens)
        counts = Counts(
            tokens=sum(s.num_model_tokens - len(s.uncounted) for s in valid),
            sequences=len(valid),
            micro_batches=sum(any(s.weight for s in micro_batch) for share in plan for micro_batch in share),
            max_completion_length=rollout.max_completion_length,
            kept=int(sum(sum(s.kept) for s in valid if s.kept)) if selects_tokens(algorithm) else None,
        )

        def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return micro_batch_loss(
                policy,
                batch,
                counts,
                algorithm,
                temperature=rollout.temperature,
                entropy_coef=entropy_coef,
                teacher=run.recipe.teacher,
            )

        share = plan[policy.accelerator.process_index]
        return experts, *backward(run, share, lambda batch: experts.around(loss_of, batch, counts.sequences))

    experts, totals, norm = within_memory(run, attempt)
    policy.step(learning_rate)
    metrics = step_metrics(totals, norm) | experts.finish(policy.accelerator)
    if algorithm.has_entropy_bonus:
        metrics["entropy_coef"] = _move_entropy_control(run, metrics["entropy_of_bonus"])
    return metrics


def with_signal(sequences: list[TrainedSequence], recipe: Recipe) -> list[TrainedSequence]:
    """The sequences that can change the gradient: a zero advantage contributes only through the KL penalty, the entropy
    bonus, the router's loss, a teacher, or a loss type that says so."""
    algorithm = recipe.algorithm
    regardless = algorithm.kl_in_loss or algorithm.has_entropy_bonus or algorithm.router_aux_loss_coef > 0
    regardless = regardless or find_loss(algorithm.loss_type).without_advantage or recipe.teacher is not None
    return [s for s in sequences if s.valid and (s.has_advantage or regardless)]


def taught(run: Run, sequences: list[TrainedSequence]) -> list[TrainedSequence]:
    """The sequences; not valid are those with a token that a teacher in the process has no embedding for (ids that pad
    the student's vocabulary, which no text holds)."""
    teacher = run.policy.teacher
    if teacher is None or teacher.vocab_size >= run.policy.model.vocab_size:
        return sequences
    known = teacher.vocab_size
    return [replace(s, valid=s.valid and max(s.completion_ids, default=0) < known) for s in sequences]


def backward(run: Run, micro_batches: list[MicroBatch], loss_of: LossOf) -> tuple[dict[str, float], float]:
    """Accumulate the gradient of the sum of ``loss_of`` over all processes' micro-batches, and clip it.

    ``loss_of`` gives a micro-batch's share of the step's loss and its sums for the metrics. Returns these combined over
    micro-batches and processes (see ``metrics.combined``), ``loss`` among them, and the gradient norm before clipping.
    Raises on every process: RunError where loss or norm is not finite, DoesNotFit where memory runs out on one.
    """
    policy, accelerator = run.policy, run.accelerator
    sums: dict[str, torch.Tensor] = {}

    def work(micro_batch: MicroBatch) -> None:
        loss, metrics = loss_of(policy.collate(micro_batch))
        (loss * accelerator.num_processes).backward()
        for name, value in ({"loss": loss.detach()} | metrics).items():
            value = value.double()
            sums[name] = combined(name, torch.stack([sums[name], value])) if name in sums else value

    work_through(policy, micro_batches, work)
    policy.average_gradients()
    totals = over_processes(accelerator, sums)
    norm = policy.clip_gradients()
    if not (math.isfinite(totals["loss"]) and math.isfinite(norm)):
        _stop_before_step(run, micro_batches, totals["loss"], norm)
    return totals, norm


def _stop_before_step(run: Run, micro_batches: list[MicroBatch], loss: float, norm: float) -> None:
    rank = run.accelerator.process_index
    path = run.folder / f"nonfinite_rank_{rank}.pt"
    kept = f"The batch is in {path}"
    try:
        torch.save([[asdict(s) for s in micro_batch] for micro_batch in micro_batches], path)
    except (OSError, RuntimeError) as error:  # of a full disk torch says the latter
        kept = f"The batch could not be written to {path} ({first_line(error)})"
    run.accelerator.wait_for_everyone()
    raise RunError(
        f"rank {rank}: the loss is {loss} and the gradient norm {norm}: stopped before the optimizer's step, so "
        f"the weights are the last step's. {kept}. Usual causes: a learning rate too high, sampler "
        "log-probabilities of -inf, or bfloat16 overflow; resume from the last checkpoint with a lower "
        "optimizer.learning_rate"
    )


def _entropy_control(run: Run) -> EntropyControl:
    """The adaptive coefficient as the last update left it; before the first, that of the recipe."""
    saved = run.progress.entropy_control
    return EntropyControl(run.recipe.algorithm.entropy_coef) if saved is None else EntropyControl(*saved)


def _entropy_coef(run: Run) -> float:
    """The coefficient of the entropy bonus in this update."""
    algorithm = run.recipe.algorithm
    if algorithm.use_adaptive_entropy:
        return _entropy_control(run).applied(algorithm.entropy_target)
    return algorithm.entropy_coef


def _move_entropy_control(run: Run, entropy: float) -> float:
    """After an update, move the adaptive coefficient for the next one (a fixed one stays), and return it."""
    algorithm = run.recipe.algorithm
    if not algorithm.use_adaptive_entropy:
        return algorithm.entropy_coef
    control = next_entropy_control(
        _entropy_control(run),
        entropy,
        target=algorithm.entropy_target,
        delta=algorithm.entropy_coef_delta,
        low=algorithm.entropy_coef_min,
        high=algorithm.entropy_coef_max,
    )
    run.progress.entropy_control = (control.coef, control.entropy)
    return control.coef
