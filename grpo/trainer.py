"""GRPO, top to bottom: rollout, score, advantages, update, sync, evaluate, save.

Deviations from the GRPO paper (DeepSeekMath, arXiv:2402.03300), all switchable in the recipe:
- no KL penalty by default (``beta: 0``), as R1-Zero-like runs do since Dr. GRPO and DAPO;
- the loss is a mean over tokens by default (``loss_type: dapo``), not over sequences, which would favour short answers;
- groups without signal take no part in the forward and backward pass (they stay in the denominators).
A *step* here is one rollout with all the optimizer updates made from it.
"""

from __future__ import annotations

from contextlib import closing

from grpo.advantages import rewards_array, step_advantages
from grpo.audit.at_start import warn_of_unpaid_answers
from grpo.audit.rows import check_rows_at_start
from grpo.backends import (
    TeacherServers,
    check_engine,
    find_backend,
    find_servers,
    make_backend,
    resolve_backend,
    rest,
)
from grpo.config import Recipe
from grpo.environments.prepared import prepared
from grpo.errors import BackendFailed
from grpo.evaluation.during import RunSuites, suites_of_run
from grpo.evaluation.held_out import evaluate
from grpo.losses import find_loss
from grpo.metrics import (
    Clock,
    completion_metrics,
    episode_metrics,
    reward_metrics,
    rollout_rows,
    source_metrics,
    staleness_metrics,
)
from grpo.model.optimizer import learning_rate
from grpo.model.teacher import check_teacher
from grpo.prompts.order import curriculum_metrics, prompts_of_step, updated_pass_rates
from grpo.report.card import card_at_end
from grpo.report.live import LiveReport
from grpo.report.write import write_report_at_end
from grpo.rollout.groups import Drawn, draw_groups
from grpo.rollout.replay import remembered, restored
from grpo.rollout.rollouts import Rollouts
from grpo.rollout.teaching import teach
from grpo.run.run import Run, due, start_run
from grpo.run.session import leave, make_accelerator, on_main, resolve_dtype
from grpo.scoring.functions import tell_left_out
from grpo.scoring.scorer import Scorer
from grpo.update.kl_in_reward import less_kl
from grpo.update.metrics import mean_over_updates
from grpo.update.step import update


def train(recipe: Recipe, resume: bool | str = False, *, allow_changed_inputs: bool = False) -> None:
    """Run a ``stage: grpo`` recipe to its end, or from a checkpoint on (``resume``: True for the newest, or a path).

    Where rows, model or the user's code have changed since the checkpoint, UserError, unless ``allow_changed_inputs``.
    """
    find_loss(recipe.algorithm.loss_type)  # user's own code: its mistakes are found before any waiting
    find_backend(recipe)
    accelerator = make_accelerator(recipe)
    recipe = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    check_engine(recipe.rollout)
    with (
        prepared(recipe) as (tokenizer, stop_ids, task, episodes),
        Scorer(recipe.functions(), recipe.scoring, max_steps=recipe.training.max_steps) as scorer,
        suites_of_run(recipe, tokenizer, task) as suites,
    ):
        check_teacher(recipe, tokenizer)
        tell_left_out(recipe.functions(), recipe.scoring.environment)
        scorer.check_columns(task.columns)
        on_main(accelerator, lambda: check_rows_at_start(recipe, task, resuming=bool(resume)))
        if not resume:
            on_main(accelerator, lambda: warn_of_unpaid_answers(recipe, task, scorer))
        teacher = find_servers(recipe, accelerator, tokenizer)
        run = start_run(
            recipe,
            accelerator,
            tokenizer,
            stop_ids,
            task,
            resume,
            needs_reference=recipe.algorithm.beta > 0,
            allow_changed_inputs=allow_changed_inputs,
            card=card_at_end,
        )
        live = LiveReport(run.folder, on=accelerator.is_main_process)
        with closing(make_backend(recipe, run.policy)) as backend, run, live:
            backend.sync(run.policy, run.progress.step)
            rollouts = Rollouts(recipe, task, backend, accelerator, episodes)
            rollouts.restore(run.progress.rollout_ahead, run.progress.step)

            def anew() -> None:
                rollouts.forget(run.progress.step)
                backend.sync(run.policy, run.progress.step)

            try:
                for _ in run.steps(lambda: evaluate_and_log(run, rollouts, scorer, suites), rollouts.state, anew):
                    train_step(run, rollouts, scorer, teacher)
                    live.after_step()
                if suites.due(run):  # patience was used up by the last evaluation
                    suites.evaluate(run, backend)
            except BackendFailed as failure:  # the policy itself is intact
                run.save()
                raise BackendFailed(f"{failure}\n{run.saved()}") from None
        run.save_final()
    on_main(accelerator, lambda: write_report_at_end(run.folder))
    leave(accelerator, run.policy)


def train_step(run: Run, rollouts: Rollouts, scorer: Scorer, teacher: TeacherServers | None = None) -> None:
    """One rollout and the updates made from it. Moves the run's progress on by a step and logs it."""
    recipe, policy, progress, task, clock = run.recipe, run.policy, run.progress, rollouts.task, Clock()
    extra, pass_rates, ahead = progress.extra_prompts, progress.pass_rates, rollouts.ahead
    prompts = prompts_of_step(recipe.prompts, task, progress.step, extra=extra, pass_rates=pass_rates, ahead=ahead)
    drawn = draw_groups(recipe, rollouts, scorer, prompts, restored(task, progress.replay), progress.step, clock)
    groups, sampled = drawn.groups, drawn.sampled
    with clock("rollout"):
        rest(rollouts.backend)
    if teacher is not None:
        with clock("teacher"):
            teach(teacher, groups, run.accelerator)
    with clock("train"):
        rewards_PG, kl_metrics = less_kl(run, rewards_array(groups), groups)
    weights_F = [reward.weight for reward in recipe.functions()]
    advantages = step_advantages(rewards_PG, groups, weights_F, recipe.algorithm)
    rate = learning_rate(recipe.optimizer, progress.step, recipe.training.max_steps)
    with clock("train"):
        updates = update(run, groups, advantages, rate)
        algorithm = recipe.algorithm
        if algorithm.sync_ref_model and (progress.step + 1) % algorithm.ref_model_sync_steps == 0:
            policy.mix_reference(algorithm.ref_model_mixup_alpha)

    generated = sum(c.num_model_tokens for group in sampled for c in group.completions)
    metrics = reward_metrics(sampled, learned=recipe.learns_from_rewards)
    metrics |= completion_metrics(sampled) | mean_over_updates(updates)
    metrics |= source_metrics(sampled, recipe.judged_by)
    if rollouts.episodes is not None:
        metrics |= episode_metrics(sampled, tools=bool(rollouts.episodes.tools))
    if recipe.rollout.max_staleness:
        metrics |= staleness_metrics(sampled, progress.step)
    metrics |= learn_of_prompts(run, drawn, rows=len(task.train))
    progress.step += 1
    progress.rollout_ahead = None  # what it held, this step has taken over
    progress.num_tokens += generated + sum(len(g.prompt.token_ids) * len(g.completions) for g in sampled)
    metrics |= kl_metrics | {"learning_rate": rate, "num_tokens": float(progress.num_tokens)}
    try:
        with clock("sync"):
            metrics |= rollouts.backend.sync(policy, progress.step)
    finally:  # the step is made, whether or not its weights arrive
        progress.seconds += clock.total()
        metrics |= {f"time/{part}": seconds for part, seconds in clock.seconds.items()}
        metrics |= {"step_time": clock.total(), "tokens_per_second": generated / clock.total()}
        if recipe.training.dollars_per_hour is not None:
            metrics["cost_usd"] = recipe.training.dollars_per_hour * progress.seconds / 3600
        run.log.log(progress.step, metrics)
        if due(recipe.training.log_rollouts_every, progress.step):
            run.log.log_rollouts(progress.step, rollout_rows(groups, progress.step, advantages))


def learn_of_prompts(run: Run, drawn: Drawn, *, rows: int) -> dict[str, float]:
    """Record in the progress what the step's groups say about prompts, for later steps. Returns metrics of it."""
    recipe, progress, config = run.recipe, run.progress, run.recipe.prompts
    progress.extra_prompts += len(drawn.sampled) - recipe.training.prompts_per_step
    progress.replay = remembered(
        progress.replay, used=drawn.replayed, groups=drawn.with_signal, most=config.replay_groups
    )
    metrics = drawn.metrics() if config.dynamic_sampling or config.replay_groups else {}
    if config.curriculum:
        progress.pass_rates = updated_pass_rates(
            progress.pass_rates, drawn.sampled, recipe.judged_by, config.curriculum_newest
        )
        metrics |= curriculum_metrics(progress.pass_rates, rows)
    return metrics


def evaluate_and_log(run: Run, rollouts: Rollouts, scorer: Scorer, suites: RunSuites) -> None:
    """Accuracy on the held-out prompts, if there are any, and on suites where they are due."""
    prompts, step = rollouts.task.eval_prompts, run.progress.step
    found: dict[str, float] = {}
    if prompts:
        with run.log.phase("evaluating", len(prompts)) as tell:
            found, rows = evaluate(
                run.recipe,
                prompts,
                rollouts.backend,
                scorer,
                run.accelerator,
                version=step,
                episodes=rollouts.episodes,
                tell=tell,
            )
        run.log.log_rollouts(step, rows, prefix="eval")
    if suites.due(run):
        found = found | suites.evaluate(run, rollouts.backend)
    if found:
        run.log.log(step, found)
