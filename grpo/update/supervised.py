"""One optimizer step of the supervised stage, on all completion tokens of the examples that are the model's: mean
cross-entropy, or the mean divergence from a teacher's distributions."""

from __future__ import annotations

import torch

from grpo.model.teacher import compared_with
from grpo.packing import MicroBatch
from grpo.run.run import Run
from grpo.types import Batch, Example, TrainedSequence
from grpo.update.experts import StepExperts
from grpo.update.forward import plan_for
from grpo.update.micro_batch_size import within_memory
from grpo.update.step import backward


def supervised_step(run: Run, examples: list[Example], learning_rate: float) -> dict[str, float]:
    """Imitate ``examples`` (those of all processes, the same list on each) in one optimizer step.

    Returns metrics: ``loss`` and ``entropy`` in nats a token, ``grad_norm`` before clipping; with a teacher
    ``cross_entropy`` and ``teacher/kl``, with experts what is said of their loads. Raises RunError on every process,
    before the optimizer's step, where loss or gradient is not finite.
    """
    teacher, tokens = run.recipe.teacher, sum(example.num_model_tokens for example in examples)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        cross_entropy, entropy, divergence = sums_of(run, batch)
        metrics = {"entropy": entropy / tokens}
        if teacher is None:
            return cross_entropy / tokens, metrics
        metrics |= {"cross_entropy": cross_entropy.detach() / tokens, "teacher/kl": divergence.detach() / tokens}
        return (teacher.coef * divergence + teacher.text_coef * cross_entropy) / tokens, metrics

    def attempt(max_tokens: int) -> tuple[StepExperts, dict[str, float], float]:
        experts, share = StepExperts(run.policy, run.recipe.algorithm), micro_batches_of(run, examples, max_tokens)
        return experts, *backward(run, share, lambda batch: experts.around(loss_of, batch, len(examples)))

    experts, totals, norm = within_memory(run, attempt)
    run.policy.step(learning_rate)
    return totals | experts.finish(run.accelerator) | {"grad_norm": norm}


def sums_of(run: Run, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a micro-batch's tokens: cross-entropy of the text, entropy, divergence from the teacher (0 without one)."""
    compared = compared_with(run.policy, batch, 1.0, run.recipe.teacher)
    logps_BT, entropy_BT, divergence_BT = run.policy.compared(batch, 1.0, compared)
    return -(logps_BT * batch.mask_BT).sum(), (entropy_BT * batch.mask_BT).sum(), (divergence_BT * batch.mask_BT).sum()


def micro_batches_of(run: Run, examples: list[Example], max_tokens: int) -> list[MicroBatch]:
    """This process's share of the examples, in micro-batches."""
    sequences = [
        TrainedSequence(
            e.prompt,
            e.completion,
            [0.0] * len(e.completion),
            advantage=1.0,
            teacher=e.teacher,
            environment=e.environment,
        )
        for e in examples
    ]
    return plan_for(run.policy, sequences, run.recipe.training, max_tokens)[run.accelerator.process_index]
