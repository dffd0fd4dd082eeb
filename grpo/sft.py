"""The supervised stage: cold start, distillation, rejection-sampled data. Loss on the completion's tokens only.

The loop is the trainer's without rollouts: examples in, mean cross-entropy over tokens, or (with a ``teacher``) the
mean divergence from the teacher's distributions. The update machinery, run folder, checkpoints and resume are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.audit.rows import warn_of_overlap
from grpo.backends import TeacherServers, find_servers
from grpo.config import Recipe
from grpo.metrics import Clock
from grpo.model.optimizer import learning_rate
from grpo.model.teacher import check_teacher
from grpo.packing import MicroBatch
from grpo.report.card import card_at_end
from grpo.report.live import LiveReport
from grpo.report.write import write_report_at_end
from grpo.rollout.teaching import ask_teacher
from grpo.run.agreement import check_drawn
from grpo.run.run import Run, start_run
from grpo.run.session import leave, make_accelerator, on_main, prepare_task, resolve_dtype
from grpo.types import Example
from grpo.update.micro_batch_size import within_memory, work_through
from grpo.update.supervised import micro_batches_of, sums_of, supervised_step


def train(recipe: Recipe, resume: bool | str = False, *, allow_changed_inputs: bool = False) -> None:
    """Run a ``stage: sft`` recipe to its end, or from a checkpoint on (as ``trainer.train`` does)."""
    accelerator = make_accelerator(recipe)
    recipe = resolve_dtype(recipe, accelerator)
    tokenizer, stop_ids, task = prepare_task(recipe)
    if not resume:
        on_main(accelerator, lambda: warn_of_overlap(task))
    check_teacher(recipe, tokenizer)
    servers = find_servers(recipe, accelerator, tokenizer)
    allowed = {"allow_changed_inputs": allow_changed_inputs}
    run = start_run(recipe, accelerator, tokenizer, stop_ids, task, resume, card=card_at_end, **allowed)
    held_out: dict[str, list[Example]] = {}  # asked of a server once: the teacher does not change

    def evaluate() -> None:
        if not held_out:
            held_out.update({source: taught(run, of, servers) for source, of in task.eval_examples.items()})
        evaluate_and_log(run, held_out)

    with run, LiveReport(run.folder, on=accelerator.is_main_process) as live:
        for step in run.steps(evaluate):
            train_step(run, task.examples(step), servers)
            live.after_step()
    run.save_final()
    on_main(accelerator, lambda: write_report_at_end(run.folder))
    leave(accelerator, run.policy)


def train_step(run: Run, examples: list[Example], servers: TeacherServers | None = None) -> None:
    """One optimizer step on the mean cross-entropy (nats) of all completion tokens of ``examples``, or on their mean
    divergence from the teacher's distributions."""
    progress, clock = run.progress, Clock()
    check_drawn(examples, f"examples for step {progress.step + 1}")
    rate = learning_rate(run.recipe.optimizer, progress.step, run.recipe.training.max_steps)
    if servers is not None:
        with clock("teacher"):
            examples = taught(run, examples, servers)
    tokens = sum(len(example.completion) for example in examples)
    with clock("train"):
        metrics = supervised_step(run, examples, rate)
    progress.step += 1
    progress.num_tokens += tokens + sum(len(example.prompt) for example in examples)
    progress.seconds += clock.total()
    metrics |= {f"time/{part}": seconds for part, seconds in clock.seconds.items()}
    metrics |= {
        "learning_rate": rate,
        "num_tokens": float(progress.num_tokens),
        "step_time": clock.total(),
        "tokens_per_second": tokens / clock.total(),
    }
    run.log.log(progress.step, metrics)


def taught(run: Run, examples: Sequence[Example], servers: TeacherServers | None) -> list[Example]:
    """The examples with what a teacher on a server says of them. Called by all processes."""
    if servers is None:
        return list(examples)
    says = ask_teacher(servers, [(example.prompt, example.completion) for example in examples], run.accelerator)
    return [example._replace(teacher=of) for example, of in zip(examples, says, strict=True)]


def evaluate_and_log(run: Run, examples: dict[str, list[Example]]) -> None:
    """The loss on the held-out examples, if there are any: of all, and with `data.mix` of each source; with a teacher,
    their divergence from it too."""
    if not any(examples.values()):
        return
    with run.log.phase("evaluating"):
        sums = {source: held_out_sums(run, of_source) for source, of_source in examples.items() if of_source}
    loss, divergence, tokens = (sum(of) for of in zip(*sums.values(), strict=True))
    metrics = {"eval/loss": loss / tokens}
    metrics |= {f"eval/sources/{source}/loss": loss / tokens for source, (loss, _, tokens) in sums.items() if source}
    metrics |= {} if run.recipe.teacher is None else {"eval/teacher_kl": divergence / tokens}
    run.log.log(run.progress.step, metrics)


@torch.no_grad()
def held_out_sums(run: Run, examples: list[Example]) -> tuple[float, float, float]:
    """Cross-entropy, and divergence from the teacher (0 without), both in nats and summed over the tokens of held-out
    completions, and how many tokens there are; each process does its share."""
    policy = run.policy

    def attempt(max_tokens: int) -> torch.Tensor:
        sums_3 = torch.zeros(3, dtype=torch.float64, device=policy.device)

        def work(micro_batch: MicroBatch) -> None:
            batch = policy.collate(micro_batch)
            cross_entropy, _, divergence = sums_of(run, batch)
            sums_3.add_(torch.stack([cross_entropy, divergence, batch.mask_BT.sum()]).double())

        work_through(policy, micro_batches_of(run, examples, max_tokens), work)
        return sums_3

    policy.model.eval()
    sums_3 = within_memory(run, attempt)
    policy.model.train()
    loss, divergence, tokens = policy.accelerator.reduce(sums_3, reduction="sum").tolist()
    return loss, divergence, tokens
