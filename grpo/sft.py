"""The supervised stage: cold start, distillation, rejection-sampled data. Loss on the completion's tokens only.

The loop is the trainer's without rollouts: examples in, mean cross-entropy over tokens. The update machinery, run
folder, checkpoints and resume are the same.
"""

from __future__ import annotations

import torch

from grpo.audit.rows import warn_of_overlap
from grpo.config import Recipe
from grpo.metrics import Clock
from grpo.model.optimizer import learning_rate
from grpo.packing import MicroBatch
from grpo.report.card import card_at_end
from grpo.report.live import LiveReport
from grpo.report.write import write_report_at_end
from grpo.run.agreement import check_drawn
from grpo.run.run import Run, start_run
from grpo.run.session import leave, make_accelerator, on_main, prepare_task, resolve_dtype
from grpo.update.micro_batch_size import within_memory, work_through
from grpo.update.supervised import Example, micro_batches_of, supervised_step


def train(recipe: Recipe, resume: bool | str = False, *, allow_changed_inputs: bool = False) -> None:
    """Run a ``stage: sft`` recipe to its end, or from a checkpoint on (as ``trainer.train`` does)."""
    accelerator = make_accelerator(recipe)
    recipe = resolve_dtype(recipe, accelerator)
    tokenizer, stop_ids, task = prepare_task(recipe)
    if not resume:
        on_main(accelerator, lambda: warn_of_overlap(task))
    allowed = {"allow_changed_inputs": allow_changed_inputs}
    run = start_run(recipe, accelerator, tokenizer, stop_ids, task, resume, card=card_at_end, **allowed)
    with run, LiveReport(run.folder, on=accelerator.is_main_process) as live:
        for step in run.steps(lambda: evaluate_and_log(run, task.eval_examples)):
            train_step(run, task.examples(step))
            live.after_step()
    run.save_final()
    on_main(accelerator, lambda: write_report_at_end(run.folder))
    leave(accelerator, run.policy)


def train_step(run: Run, examples: list[Example]) -> None:
    """One optimizer step on the mean cross-entropy (nats) of all completion tokens of ``examples``."""
    progress, clock = run.progress, Clock()
    check_drawn(examples, f"examples for step {progress.step + 1}")
    rate = learning_rate(run.recipe.optimizer, progress.step, run.recipe.training.max_steps)
    tokens = sum(len(completion) for _, completion in examples)
    with clock("train"):
        metrics = supervised_step(run, examples, rate)
    progress.step += 1
    progress.num_tokens += tokens + sum(len(prompt) for prompt, _ in examples)
    progress.seconds += clock.total()
    metrics |= {
        "learning_rate": rate,
        "num_tokens": float(progress.num_tokens),
        "step_time": clock.total(),
        "time/train": clock.total(),
        "tokens_per_second": tokens / clock.total(),
    }
    run.log.log(progress.step, metrics)


def evaluate_and_log(run: Run, examples: dict[str, list[Example]]) -> None:
    """The loss on the held-out examples, if there are any: of all, and with `data.mix` of each source."""
    if any(examples.values()):
        with run.log.phase("evaluating"):
            sums = {source: held_out_sums(run, of_source) for source, of_source in examples.items() if of_source}
        metrics = {"eval/loss": sum(loss for loss, _ in sums.values()) / sum(tokens for _, tokens in sums.values())}
        metrics |= {f"eval/sources/{source}/loss": loss / tokens for source, (loss, tokens) in sums.items() if source}
        run.log.log(run.progress.step, metrics)


@torch.no_grad()
def held_out_sums(run: Run, examples: list[Example]) -> tuple[float, float]:
    """Cross-entropy (nats) summed over the tokens of held-out completions, and how many there are, each process doing
    its share."""
    policy = run.policy

    def attempt(max_tokens: int) -> torch.Tensor:
        sums_2 = torch.zeros(2, dtype=torch.float64, device=policy.device)

        def work(micro_batch: MicroBatch) -> None:
            batch = policy.collate(micro_batch)
            logps_BT, _ = policy.logprobs(batch, temperature=1.0)
            sums_2.add_(torch.stack([-(logps_BT * batch.mask_BT).sum(), batch.mask_BT.sum()]).double())

        work_through(policy, micro_batches_of(run, examples, max_tokens), work)
        return sums_2

    policy.model.eval()
    sums_2 = within_memory(run, attempt)
    policy.model.train()
    loss, tokens = policy.accelerator.reduce(sums_2, reduction="sum").tolist()
    return loss, tokens
