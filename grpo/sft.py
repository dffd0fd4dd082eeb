"""The supervised stage: cold start, distillation, rejection-sampled data. Loss on the completion's tokens only.

The loop is the trainer's without rollouts: examples in, token-mean cross-entropy; the same update machinery, run
folder, checkpoints and resume.
"""

from __future__ import annotations

from pathlib import Path

import torch

from grpo.config import Recipe
from grpo.model.optimizer import learning_rate
from grpo.model.policy import Policy
from grpo.packing import MicroBatch
from grpo.report.write import write_report
from grpo.run.log import Tracker
from grpo.run.session import (
    Clock,
    PreemptionGuard,
    due,
    finished,
    leave,
    make_accelerator,
    on_main,
    open_tracker,
    prepare_folder,
    prepare_task,
    resolve_dtype,
    seed_step,
)
from grpo.run.state import Progress, find_checkpoint, restore_state, save_state
from grpo.types import Batch, Sequence
from grpo.update.forward import plan_for
from grpo.update.micro_batch_size import fitting, within_memory
from grpo.update.step import backward

Example = tuple[list[int], list[int]]  # token ids of prompt and completion


def train(recipe: Recipe, resume: bool | str = False) -> None:
    """Run a ``stage: sft`` recipe to its end, or from a checkpoint on."""
    accelerator = make_accelerator(recipe)
    recipe = resolve_dtype(recipe, accelerator)
    tokenizer, stop_ids, task = prepare_task(recipe)
    folder = prepare_folder(recipe, accelerator, resume)
    policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=False)
    checkpoint = on_main(accelerator, lambda: find_checkpoint(folder, resume))
    progress = restore_state(checkpoint, recipe, policy)
    with (
        open_tracker(folder, recipe, accelerator, progress, resume) as tracker,
        PreemptionGuard(accelerator) as preemption,
    ):

        def evaluate_and_log() -> None:
            if task.eval_examples:
                tracker.log(progress.step, {"eval/loss": held_out_loss(recipe, policy, task.eval_examples)})

        if progress.step == 0 and recipe.evaluation.at_start:
            evaluate_and_log()
        while not finished(recipe, accelerator, progress):
            seed_step(recipe, progress.step, accelerator.process_index)
            train_step(recipe, folder, task.examples(progress.step), policy, tracker, progress)

            stopping = preemption.requested()
            done = finished(recipe, accelerator, progress)
            if done or due(recipe.training.eval_every, progress.step):
                evaluate_and_log()
            if done or stopping or due(recipe.training.save_every, progress.step):
                progress.metrics_offset = tracker.offset
                save_state(folder, recipe, policy, progress)
            if stopping and not done:
                preemption.stop(folder, progress.step)
    policy.save_pretrained(folder / "final")
    on_main(accelerator, lambda: write_report(folder))
    leave(accelerator, policy)


def train_step(
    recipe: Recipe, folder: Path, examples: list[Example], policy: Policy, tracker: Tracker, progress: Progress
) -> None:
    """One optimizer step on the mean cross-entropy (nats) of all completion tokens of ``examples``."""
    clock = Clock()
    rate = learning_rate(recipe.optimizer, progress.step, recipe.training.max_steps)
    with clock("train"):
        tokens = sum(len(completion) for _, completion in examples)

        def loss_of(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logps_BT, entropy_BT = policy.logprobs(batch, temperature=1.0)
            return -(logps_BT * batch.mask_BT).sum() / tokens, {"entropy": (entropy_BT * batch.mask_BT).sum() / tokens}

        def attempt(max_tokens: int) -> tuple[dict[str, float], float]:
            return backward(policy, _my_micro_batches(recipe, policy, examples, max_tokens), loss_of, folder)

        totals, norm = within_memory(policy, recipe.training, attempt)
        policy.step(rate)
    progress.step += 1
    progress.num_tokens += sum(len(prompt) + len(completion) for prompt, completion in examples)
    progress.seconds += clock.total()
    tracker.log(
        progress.step,
        totals
        | {
            "grad_norm": norm,
            "learning_rate": rate,
            "num_tokens": float(progress.num_tokens),
            "step_time": clock.total(),
            "time/train": clock.total(),
            "tokens_per_second": tokens / clock.total(),
        },
    )


@torch.no_grad()
def held_out_loss(recipe: Recipe, policy: Policy, examples: list[Example]) -> float:
    """Mean cross-entropy (nats a token) over the held-out completions, each process doing its share."""

    def attempt(max_tokens: int) -> torch.Tensor:
        sums_2 = torch.zeros(2, dtype=torch.float64, device=policy.device)
        for micro_batch in _my_micro_batches(recipe, policy, examples, max_tokens):
            with fitting(policy, micro_batch):
                batch = policy.collate(micro_batch)
                logps_BT, _ = policy.logprobs(batch, temperature=1.0)
                sums_2 += torch.stack([-(logps_BT * batch.mask_BT).sum(), batch.mask_BT.sum()]).double()
        return sums_2

    policy.model.eval()
    sums_2 = within_memory(policy, recipe.training, attempt)
    policy.model.train()
    loss, tokens = policy.accelerator.reduce(sums_2, reduction="sum").tolist()
    return loss / tokens


def _my_micro_batches(recipe: Recipe, policy: Policy, examples: list[Example], max_tokens: int) -> list[MicroBatch]:
    sequences = [
        Sequence(prompt, completion, [0.0] * len(completion), advantage=1.0) for prompt, completion in examples
    ]
    return plan_for(policy, sequences, recipe.training, max_tokens)[policy.accelerator.process_index]
