"""Metrics of a step's rollouts, under TRL's names, and the times of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np

from grpo.advantages import rewards_array, zero_std
from grpo.types import Group, Status


def completion_metrics(groups: list[Group]) -> dict[str, float]:
    """Lengths in tokens over all completions, and over those that ended by themselves; the share of a group's that
    differ."""
    completions = [c for group in groups for c in group.completions]
    lengths = np.array([len(c.token_ids) for c in completions])
    different = [len({c.text for c in group.completions}) / len(group.completions) for group in groups]
    ended = np.array([c.status is Status.STOP for c in completions])
    metrics = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": np.mean([c.status is Status.LENGTH for c in completions]),
        "completions/unique_ratio": np.mean(different),
        "completions/mean_terminated_length": lengths[ended].mean() if ended.any() else 0.0,
        "completions/min_terminated_length": lengths[ended].min() if ended.any() else 0.0,
        "completions/max_terminated_length": lengths[ended].max() if ended.any() else 0.0,
    }
    return {name: float(value) for name, value in metrics.items()}


def staleness_metrics(groups: list[Group], step: int) -> dict[str, float]:
    """How many steps before ``step`` the policy was made that drew a token: mean over tokens, and the largest."""
    spans = [span for group in groups for completion in group.completions for span in completion.versions]
    ages = np.array([step - span.version for span in spans], dtype=float)
    tokens = np.array([span.end - span.start for span in spans])
    if not tokens.sum():
        return {}
    return {
        "sampling/staleness/mean": float(ages @ tokens / tokens.sum()),
        "sampling/staleness/max": float(ages[tokens > 0].max()),
    }


def reward_metrics(groups: list[Group]) -> dict[str, float]:
    """Mean reward, spread within groups, share of groups without signal, each function's part, verdicts, and metrics
    that reward functions logged."""
    rewards_PG = rewards_array(groups)
    scored_PG = ~np.isnan(rewards_PG)
    metrics = {"frac_reward_zero_std": float(zero_std(rewards_PG).mean())}
    if scored_PG.any():
        spreads = [row[~np.isnan(row)].std(ddof=1) for row in rewards_PG if (~np.isnan(row)).sum() > 1]
        metrics["reward"] = float(np.nanmean(rewards_PG))
        metrics["reward_std"] = float(np.mean(spreads)) if spreads else 0.0
    metrics["frac_unscored"] = float(1 - scored_PG.mean())
    for name in groups[0].rewards_by_function:
        values = [r for group in groups for r in group.rewards_by_function[name] if r is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = float(np.mean(values))
            metrics[f"rewards/{name}/std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    verdicts: Counter[str] = Counter()
    for group in groups:
        for name, counts in group.verdicts.items():
            verdicts.update({f"verdicts/{name}/{verdict}": n for verdict, n in counts.items()})
    custom: dict[str, list[float]] = {}
    for group in groups:
        for name, values in group.extra_metrics.items():
            custom.setdefault(name, []).extend(values)
    return metrics | {k: float(v) for k, v in verdicts.items()} | {k: float(np.mean(v)) for k, v in custom.items()}


OF_SOURCE = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "frac_unscored": "frac_unscored",
    "completions/mean_length": "mean_length",
    "completions/clipped_ratio": "clipped_ratio",
}


def source_metrics(groups: list[Group], judge: Callable[[str], str]) -> dict[str, float]:
    """What the groups of each source of `data.mix` say, as ``sources/LABEL/…``; nothing without it.

    ``judge`` names the reward that judges a source's completions. Of a source without a group nothing is said.
    """
    metrics: dict[str, float] = {}
    for source in sorted({group.prompt.source for group in groups} - {""}):
        of_source = [group for group in groups if group.prompt.source == source]
        found = reward_metrics(of_source) | completion_metrics(of_source)
        said = {short: found[name] for name, short in OF_SOURCE.items() if name in found}
        judged = [r for group in of_source for r in group.rewards_by_function[judge(source)] if r is not None]
        if judged:
            said["accuracy"] = float(np.mean([r >= 1 for r in judged]))
        said["prompts"] = float(len(of_source))
        metrics |= {f"sources/{source}/{name}": value for name, value in said.items()}
    return metrics


def rollout_rows(groups: list[Group], step: int, advantages_PG: np.ndarray | None = None) -> list[dict]:
    """One JSON object per completion, for ``rollouts/``."""
    rows = []
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            row = {
                "step": step,
                **({"source": group.prompt.source} if group.prompt.source else {}),
                "prompt_id": group.prompt.id,
                "sample": g,
                "prompt": group.prompt.text,
                "completion": completion.text,
                "status": completion.status.value,
                "num_tokens": len(completion.token_ids),
                "reward": group.rewards[g],
                "rewards": {name: values[g] for name, values in group.rewards_by_function.items()},
                "versions": [[s.start, s.end, s.version] for s in completion.versions],
                "columns": group.prompt.columns | {k: v[g] for k, v in group.extra_columns.items()},
            }
            if advantages_PG is not None:
                row["advantage"] = float(advantages_PG[p, g])
            rows.append(row)
    return rows


class Clock:
    """Seconds by part of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - start

    def total(self) -> float:
        return sum(self.seconds.values())
