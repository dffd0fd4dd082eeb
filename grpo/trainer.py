"""GRPO, top to bottom: rollout, score, advantages, update, sync, evaluate, save.

Deviations from the GRPO paper (DeepSeekMath, arXiv:2402.03300), all switchable in the recipe:
- no KL penalty by default (``beta: 0``), as R1-Zero-like runs do since Dr. GRPO and DAPO;
- the loss is a mean over tokens by default (``loss_type: dapo``), not over sequences, which would favour short answers;
- groups without signal take no part in the forward and backward pass (they stay in the denominators).
A *step* here is one rollout with all the optimizer updates made from it.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from grpo.advantages import rewards_array, step_advantages
from grpo.audit.rows import warn_of_unscorable_rows
from grpo.backends import make_backend
from grpo.backends.base import Backend
from grpo.config import Recipe
from grpo.errors import BackendFailed
from grpo.evaluate import evaluate
from grpo.losses import find_loss
from grpo.metrics import completion_metrics, reward_metrics, rollout_rows
from grpo.model.optimizer import learning_rate
from grpo.model.policy import Policy
from grpo.prompts.order import curriculum_metrics, prompts_of_step, updated_pass_rates
from grpo.prompts.task import Task
from grpo.report.write import write_report
from grpo.rollout.groups import Drawn, draw_groups
from grpo.rollout.replay import remembered, restored, with_sampler_as_old
from grpo.rollout.rollouts import Rollouts
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
    saved,
    seed_step,
)
from grpo.run.state import Progress, find_checkpoint, restore_state, save_state
from grpo.scoring.scorer import Scorer
from grpo.types import Group
from grpo.update.forward import precompute_logprobs
from grpo.update.step import less_kl, optimizer_step, to_sequences


def train(recipe: Recipe, resume: bool | str = False) -> None:
    """Run a ``stage: grpo`` recipe to its end, or from a checkpoint on (``resume``: True for the newest, or a path)."""
    find_loss(recipe.algorithm.loss_type)  # a file of the user's own: its mistakes come before any waiting
    accelerator = make_accelerator(recipe)
    recipe = resolve_dtype(recipe, accelerator)
    tokenizer, stop_ids, task = prepare_task(recipe)
    with Scorer(recipe.rewards, recipe.scoring, max_steps=recipe.training.max_steps) as scorer:
        scorer.check_columns(task.columns)
        on_main(accelerator, lambda: warn_of_unscorable_rows(recipe, task))
        folder = prepare_folder(recipe, accelerator, resume)
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, needs_reference=recipe.algorithm.beta > 0)
        checkpoint = on_main(accelerator, lambda: find_checkpoint(folder, resume))
        progress = restore_state(checkpoint, recipe, policy)
        backend = make_backend(recipe, policy)
        with (
            closing(backend),
            open_tracker(folder, recipe, accelerator, progress, resume) as tracker,
            PreemptionGuard(accelerator) as preemption,
        ):
            backend.sync(policy, progress.step)
            rollouts = Rollouts(recipe, task, backend, accelerator)
            rollouts.restore(progress.rollout_ahead)

            def save() -> None:
                progress.metrics_offset = tracker.offset
                save_state(folder, recipe, policy, progress)

            def evaluate_and_log() -> None:
                if task.eval_prompts:
                    found, rows = evaluate(
                        recipe, task.eval_prompts, backend, scorer, accelerator, version=progress.step
                    )
                    tracker.log(progress.step, found)
                    tracker.log_rollouts(progress.step, rows, prefix="eval")

            if progress.step == 0 and recipe.evaluation.at_start:
                evaluate_and_log()
            try:
                while not finished(recipe, accelerator, progress):
                    seed_step(recipe, progress.step, accelerator.process_index)
                    train_step(recipe, folder, task, rollouts, policy, backend, scorer, tracker, progress)

                    stopping = preemption.requested()
                    done = finished(recipe, accelerator, progress)
                    if done or due(recipe.training.eval_every, progress.step):
                        evaluate_and_log()
                    if done or stopping or due(recipe.training.save_every, progress.step):
                        progress.rollout_ahead = None if done else rollouts.state()
                        save()
                    if stopping and not done:
                        preemption.stop(folder, progress.step)
            except BackendFailed as failure:  # the policy is whole
                save()
                raise BackendFailed(f"{failure}\n{saved(folder, progress.step)}") from None
        policy.save_pretrained(folder / "final")
    on_main(accelerator, lambda: write_report(folder))
    leave(accelerator, policy)


def train_step(
    recipe: Recipe,
    folder: Path,
    task: Task,
    rollouts: Rollouts,
    policy: Policy,
    backend: Backend,
    scorer: Scorer,
    tracker: Tracker,
    progress: Progress,
) -> None:
    """One rollout and the updates made from it. Moves ``progress`` on by a step and logs it."""
    clock = Clock()
    prompts = prompts_of_step(recipe, task, progress.step, extra=progress.extra_prompts, pass_rates=progress.pass_rates)
    drawn = draw_groups(recipe, rollouts, scorer, prompts, restored(task, progress.replay), progress.step, clock)
    groups, sampled = drawn.groups, drawn.sampled
    with clock("train"):
        rewards_PG, kl_metrics = less_kl(rewards_array(groups), policy, groups, recipe)
    weights_F = [reward.weight for reward in recipe.rewards]
    advantages_PG = step_advantages(rewards_PG, groups, weights_F, recipe.algorithm)
    rate = learning_rate(recipe.optimizer, progress.step, recipe.training.max_steps)
    with clock("train"):
        updates = update(recipe, folder, policy, groups, advantages_PG, rate)
        algorithm = recipe.algorithm
        if algorithm.sync_ref_model and (progress.step + 1) % algorithm.ref_model_sync_steps == 0:
            policy.mix_reference(algorithm.ref_model_mixup_alpha)

    generated = sum(len(c.token_ids) for group in sampled for c in group.completions)
    metrics = reward_metrics(sampled) | completion_metrics(sampled) | mean_over_updates(updates)
    metrics |= learn_of_prompts(recipe, task, drawn, progress)
    progress.step += 1
    progress.rollout_ahead = None  # if there was one, this step has used it
    progress.num_tokens += generated + sum(len(g.prompt.token_ids) * len(g.completions) for g in sampled)
    metrics |= kl_metrics | {"learning_rate": rate, "num_tokens": float(progress.num_tokens)}
    try:
        with clock("sync"):
            metrics |= backend.sync(policy, progress.step)
    finally:  # the step is made, whether or not its weights arrive
        progress.seconds += clock.total()
        metrics |= {f"time/{part}": seconds for part, seconds in clock.seconds.items()}
        metrics |= {"step_time": clock.total(), "tokens_per_second": generated / clock.total()}
        if recipe.training.dollars_per_hour is not None:
            metrics["cost_usd"] = recipe.training.dollars_per_hour * progress.seconds / 3600
        tracker.log(progress.step, metrics)
        if due(recipe.training.log_rollouts_every, progress.step):
            tracker.log_rollouts(progress.step, rollout_rows(groups, progress.step, advantages_PG))


def learn_of_prompts(recipe: Recipe, task: Task, drawn: Drawn, progress: Progress) -> dict[str, float]:
    """What the step's groups say about prompts, for the steps to come: moves ``progress`` on; metrics of it."""
    config = recipe.prompts
    progress.extra_prompts += len(drawn.sampled) - recipe.training.prompts_per_step
    progress.replay = remembered(
        progress.replay, used=drawn.replayed, groups=drawn.with_signal, most=config.replay_groups
    )
    metrics = drawn.metrics() if config.dynamic_sampling or config.replay_groups else {}
    if config.curriculum:
        judged_by = recipe.evaluation.reward or recipe.reward_names()[0]
        progress.pass_rates = updated_pass_rates(
            progress.pass_rates, drawn.sampled, judged_by, config.curriculum_newest
        )
        metrics |= curriculum_metrics(progress.pass_rates, len(task.train))
    return metrics


def update(
    recipe: Recipe, folder: Path, policy: Policy, groups: list[Group], advantages_PG: np.ndarray, rate: float
) -> list[dict[str, float]]:
    """``num_iterations`` passes over the rollout in ``num_minibatches`` optimizer steps each; metrics of every step.

    With a single optimizer step the policy that sampled is the policy being updated: its old log-probabilities are the
    current ones, and no forward pass is spent on them. A replayed group's are always those it was sampled with.
    """
    algorithm, training, temperature = recipe.algorithm, recipe.training, recipe.rollout.temperature
    sequences = to_sequences(groups, advantages_PG.tolist(), algorithm)
    if algorithm.num_iterations * algorithm.num_minibatches > 1 or any(group.replayed for group in groups):
        sequences = precompute_logprobs(
            policy, sequences, training, temperature=temperature, reference=algorithm.kl_in_loss
        )
        sequences = with_sampler_as_old(sequences, groups)
    size = len(sequences) // algorithm.num_minibatches
    return [
        optimizer_step(
            policy,
            sequences[start : start + size],
            algorithm,
            training,
            temperature=temperature,
            learning_rate=rate,
            max_completion_length=recipe.rollout.max_completion_length,
            dump_to=folder,
        )
        for _ in range(algorithm.num_iterations)
        for start in range(0, len(sequences), size)
    ]


def mean_over_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over a step's optimizer updates; ``sampling/`` compares sampler and trainer, so it is the first one's."""
    done = [u for u in updates if "skipped" not in u]
    metrics = {"updates_skipped": float(len(updates) - len(done))}
    if done:
        metrics |= {name: float(np.mean([u[name] for u in done])) for name in done[0]}
        metrics |= {name: value for name, value in done[0].items() if name.startswith("sampling/")}
    return metrics
