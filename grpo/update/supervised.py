"""One optimizer step of the supervised stage: mean cross-entropy over all completion tokens of the examples."""

from __future__ import annotations

import torch

from grpo.packing import MicroBatch
from grpo.run.run import Run
from grpo.types import Batch, TrainedSequence
from grpo.update.forward import plan_for
from grpo.update.micro_batch_size import within_memory
from grpo.update.step import backward

Example = tuple[list[int], list[int]]  # token ids of prompt and completion


def supervised_step(run: Run, examples: list[Example], learning_rate: float) -> dict[str, float]:
    """Imitate ``examples`` (those of all processes, the same list on each) in one optimizer step.

    Returns metrics: ``loss`` and ``entropy`` in nats a token, ``grad_norm`` before clipping. Raises RunError on every
    process, before the optimizer's step, where loss or gradient is not finite.
    """
    policy, tokens = run.policy, sum(len(completion) for _, completion in examples)

    def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logps_BT, entropy_BT = policy.logprobs(batch, temperature=1.0)
        return -(logps_BT * batch.mask_BT).sum() / tokens, {"entropy": (entropy_BT * batch.mask_BT).sum() / tokens}

    totals, norm = within_memory(
        run, lambda max_tokens: backward(run, micro_batches_of(run, examples, max_tokens), loss_of)
    )
    policy.step(learning_rate)
    return totals | {"grad_norm": norm}


def micro_batches_of(run: Run, examples: list[Example], max_tokens: int) -> list[MicroBatch]:
    """This process's share of the examples, in micro-batches."""
    sequences = [
        TrainedSequence(prompt, completion, [0.0] * len(completion), advantage=1.0) for prompt, completion in examples
    ]
    return plan_for(run.policy, sequences, run.recipe.training, max_tokens)[run.accelerator.process_index]
