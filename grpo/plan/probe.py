"""A few groups sampled and scored with the real model before any training: will this recipe learn?

What is sampled is what the first step would draw, with its keys, over more prompts.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grpo.audit.at_start import audit_at_start
from grpo.backends import check_engine, find_backend, make_backend, resolve_backend
from grpo.config import Recipe
from grpo.environments.prepared import prepared
from grpo.errors import UserError, first_line
from grpo.evaluation.held_out import question
from grpo.evaluation.statistics import accuracy_metrics, wilson_interval
from grpo.losses import find_loss
from grpo.metrics import Clock, completion_metrics, reward_metrics, rollout_rows, source_metrics
from grpo.model.policy import Policy
from grpo.packing import to_sequences
from grpo.plan.findings import Figures, Finding, findings
from grpo.plan.here import plan_here
from grpo.plan.plan import Plan
from grpo.plan.work import assumed_lengths
from grpo.prompts.order import prompts_of_step
from grpo.rollout.groups import has_signal
from grpo.rollout.rollouts import Rollouts
from grpo.run.exchange import gather_groups
from grpo.run.run import Run
from grpo.run.session import make_accelerator, resolve_dtype
from grpo.scoring.scorer import Scorer
from grpo.types import Group
from grpo.update.forward import sequence_statistics

COMPARED = 64  # completions whose log-probabilities the trainer computes too


@dataclass
class Probe:
    """``rows`` are the completions, as ``rollouts/`` has them; the same on every process. ``plan`` is of a run with
    these lengths on this machine; where there is none, ``no_plan`` says why."""

    figures: Figures
    findings: list[Finding]
    rows: list[dict[str, Any]]
    plan: Plan | None = None
    no_plan: str = ""
    by_source: dict[str, float] = field(default_factory=dict)
    """What is said of each source of `data.mix`, as metrics (``source_metrics``)."""

    @property
    def goes(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        found = [asdict(finding) for finding in self.findings]
        planned = {"plan": self.plan and self.plan.as_json(), "no_plan": self.no_plan}
        by_source = {"by_source": self.by_source} if self.by_source else {}
        return {"goes": self.goes, "findings": found} | asdict(self.figures) | by_source | planned


def probe(recipe: Recipe, prompts: int) -> Probe:
    """``sampled``, and what a run with these lengths takes on this machine."""
    found, resolved = sampled(recipe, prompts)
    figures = found.figures
    given = {"prompt": figures.mean_prompt, "completion": figures.mean_length, "with_signal": figures.with_signal}
    given |= {"environment": figures.mean_environment}
    try:
        found.plan = plan_here(resolved, assumed_lengths(resolved, **given))
    except UserError as error:
        found.no_plan = first_line(error)
    return found


def sampled(recipe: Recipe, prompts: int) -> tuple[Probe, Recipe]:
    """Sample and score ``prompts`` groups, or one of each row where there are fewer. Nothing is trained or written.

    Returns also the recipe with what `auto` is here. Raises UserError as a run would: every mistake that a run finds
    before its first step is found here.
    """
    find_loss(recipe.algorithm.loss_type)
    find_backend(recipe)
    accelerator = make_accelerator(recipe)
    resolved = resolve_backend(resolve_dtype(recipe, accelerator), accelerator)
    recipe = resolved.model_copy(update={"rollout": resolved.rollout.model_copy(update={"max_staleness": 0})})
    check_engine(recipe.rollout)
    clock = Clock()
    with (
        prepared(recipe) as (tokenizer, stop_ids, task, episodes),
        Scorer(recipe.functions(), recipe.scoring, max_steps=1) as scorer,
    ):
        scorer.check_columns(task.columns)
        unpaid = audit_at_start(recipe, task, scorer)
        policy = Policy(recipe, accelerator, tokenizer, stop_ids, False)
        with closing(make_backend(recipe, policy)) as backend:
            backend.sync(policy, 0)
            drawn = prompts_of_step(recipe.prompts, task, 0, extra=0, pass_rates={})
            rollouts, scoring = Rollouts(recipe, task, backend, accelerator, episodes), scorer.start(0)
            with clock("rollout"):
                mine = rollouts.take(0, drawn, min(prompts, len(task.train)), on_group=scoring.add)
            with clock("score"):
                scoring.finish()
            groups = gather_groups(mine)
    entropy, difference = _compared(recipe, policy, groups)
    figures = _figures(recipe, groups, entropy=entropy, difference=difference, seconds=clock.total())
    by_source = source_metrics(groups, recipe.judged_by)
    return Probe(figures, findings(figures, unpaid), rollout_rows(groups, 0), by_source=by_source), resolved


def _compared(recipe: Recipe, policy: Policy, groups: list[Group]) -> tuple[float, float]:
    """Mean entropy, and mean distance between the sampler's and the trainer's log-probabilities, in nats a token."""
    G = recipe.rollout.num_generations
    few = groups[: max(COMPARED // G, 1)]
    sequences = [s for s in to_sequences(few, np.zeros((len(few), G)), recipe.algorithm) if s.num_model_tokens]
    with tempfile.TemporaryDirectory() as folder:
        statistics = sequence_statistics(Run(recipe, policy, Path(folder)), sequences, reference=False)
    pairs = list(zip(statistics, sequences, strict=True))
    own = [list(s.model_places()) for s in sequences]
    entropies = np.concatenate(
        [np.take(found.entropies, places) for found, places in zip(statistics, own, strict=True)]
    )
    # Of a truncated distribution the sampler gives the renormalized probability.
    differences = [np.abs(np.subtract(of.logprobs, of.log_left) - s.sampler_logprobs) for of, s in pairs]
    gaps = np.concatenate([np.take(of, places) for of, places in zip(differences, own, strict=True)])
    return float(entropies.mean()), float(np.nanmean(gaps))


def _figures(recipe: Recipe, groups: list[Group], *, entropy: float, difference: float, seconds: float) -> Figures:
    metrics = reward_metrics(groups) | completion_metrics(groups)
    signal = has_signal(groups, [reward.weight for reward in recipe.functions()], recipe.algorithm)
    low, high = wilson_interval(sum(signal), len(groups))
    judges = [recipe.judged_by(group.prompt.source) for group in groups]
    judged = [group.rewards_by_function[judge] for group, judge in zip(groups, judges, strict=True)]
    solved_PG = np.array([[value is not None and value >= 1 for value in values] for values in judged])
    accuracy = accuracy_metrics(solved_PG, [question(group) for group in groups])
    counts = Counter[str]()
    for group, judge in zip(groups, judges, strict=True):
        counts.update(group.verdicts.get(judge, {}))
    completions = solved_PG.size
    return Figures(
        groups=len(groups),
        completions=completions,
        with_signal=float(np.mean(signal)),
        signal_low=low,
        signal_high=high,
        answer_signal=float((solved_PG.any(1) & ~solved_PG.all(1)).mean()),
        accuracy=accuracy["eval/accuracy"],
        accuracy_low=accuracy["eval/accuracy_low"],
        accuracy_high=accuracy["eval/accuracy_high"],
        pass_at_G=float(solved_PG.any(1).mean()),
        reward=metrics.get("reward", float("nan")),
        cut_off=metrics["completions/clipped_ratio"],
        unique=metrics["completions/unique_ratio"],
        unscored=metrics["frac_unscored"],
        mean_length=metrics["completions/mean_length"],
        mean_prompt=float(np.mean([len(group.prompt.token_ids) for group in groups])),
        entropy=entropy,
        sampler_difference=difference,
        verdicts={name: count / completions for name, count in counts.most_common()},
        seconds=seconds,
        mean_environment=float(np.mean([len(c.token_ids) - c.num_model_tokens for g in groups for c in g.completions])),
    )
