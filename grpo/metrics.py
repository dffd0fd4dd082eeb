"""Metrics of a step's rollouts, under TRL's names, and the times of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np

from grpo.advantages import rewards_array, zero_std
from grpo.types import Completion, Group, Status, VersionSpan


def completion_metrics(groups: list[Group]) -> dict[str, float]:
    """Lengths in tokens over all completions, and over those that ended by themselves (an episode also where its
    environment ended it); the share of a group's that differ. Of an episode the model's tokens count."""
    completions = [c for group in groups for c in group.completions]
    lengths = np.array([c.num_model_tokens for c in completions])
    different = [len({c.text for c in group.completions}) / len(group.completions) for group in groups]
    ended = np.array([c.status in (Status.STOP, Status.ENVIRONMENT) for c in completions])
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


def episode_metrics(groups: list[Group], *, tools: bool) -> dict[str, float]:
    """What an environment made of completions. ``environment/cut_frequency`` is the share of turns of whose answer the
    model has read a part. Calls are counted where there are ``tools``: TRL's
    ``tools/call_frequency`` is calls a completion, ``tools/failure_frequency`` the share of calls that failed, and
    ``tools/errors/KIND`` how many did so in which way."""
    completions = [c for group in groups for c in group.completions]
    episodes = [c.episode for c in completions if c.episode is not None]
    turns = [len(episode.turns) for episode in episodes] or [0]
    metrics = {
        "completions/mean_turns": float(np.mean(turns)),
        "completions/max_turns": float(max(turns)),
        "completions/mean_environment_tokens": float(
            np.mean([len(c.token_ids) - c.num_model_tokens for c in completions])
        ),
    }
    metrics |= {
        f"completions/ended/{status.value}": float(np.mean([c.status is status for c in completions]))
        for status in Status
    }
    failures = Counter(episode.failure for episode in episodes if episode.failure)
    metrics |= {f"environment/failed/{cause}": float(n) for cause, n in failures.items()}
    cut = sum(turn.cut for episode in episodes for turn in episode.turns)
    metrics["environment/cut_frequency"] = cut / max(sum(turns), 1)
    if not tools:
        return metrics
    calls = [call for episode in episodes for turn in episode.turns for call in turn.calls]
    errors = Counter(call.error for call in calls if call.error)
    metrics["tools/call_frequency"] = len(calls) / len(completions)
    metrics["tools/failure_frequency"] = errors.total() / max(len(calls), 1)
    return metrics | {f"tools/errors/{kind}": float(n) for kind, n in errors.items()}


def staleness_metrics(groups: list[Group], step: int) -> dict[str, float]:
    """How many steps before ``step`` the policy was made that drew a token: mean over tokens, and the largest."""
    completions = [completion for group in groups for completion in group.completions]
    spans = [(completion, span) for completion in completions for span in completion.versions]
    ages = np.array([step - span.version for _, span in spans], dtype=float)
    tokens = np.array([_drawn(completion, span) for completion, span in spans])
    if not tokens.sum():
        return {}
    return {
        "sampling/staleness/mean": float(ages @ tokens / tokens.sum()),
        "sampling/staleness/max": float(ages[tokens > 0].max()),
    }


def _drawn(completion: Completion, span: VersionSpan) -> int:
    """How many tokens of a span the model drew."""
    if completion.episode is None:
        return span.end - span.start
    return sum(max(min(turn.end, span.end) - max(turn.start, span.start), 0) for turn in completion.episode.turns)


def reward_metrics(groups: list[Group], *, learned: bool = True) -> dict[str, float]:
    """Mean reward, spread within groups, share of groups without signal, each function's part, verdicts, and metrics
    that reward functions logged. Where rewards are measured alone, and not ``learned`` from, those of their sum are
    left out; without reward functions there are none."""
    if not groups[0].rewards_by_function:
        return {}
    rewards_PG = rewards_array(groups)
    scored_PG = ~np.isnan(rewards_PG)
    metrics = {"frac_reward_zero_std": float(zero_std(rewards_PG).mean())} if learned else {}
    if scored_PG.any() and learned:
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


def rollout_rows(groups: list[Group], step: int, advantages: np.ndarray | None = None) -> list[dict]:
    """One JSON object per completion, for ``rollouts/``. ``advantages``: (P,G), or (P,G,U) with one for each turn."""
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
                "num_tokens": completion.num_model_tokens,
                "reward": group.rewards[g],
                "rewards": {name: values[g] for name, values in group.rewards_by_function.items()},
                "versions": [[s.start, s.end, s.version] for s in completion.versions],
                "columns": group.prompt.columns | {k: v[g] for k, v in group.extra_columns.items()},
            }
            of_turns = None
            if advantages is not None and advantages.ndim == 3:
                of_turns = advantages[p, g].tolist()
            elif advantages is not None:
                row["advantage"] = float(advantages[p, g])
            rows.append(row | episode_row(completion, of_turns))
    return rows


def question_of(row: Mapping[str, Any]) -> str:
    """What a row of a rollout file asks, to tell questions apart: outcomes of the same question are not independent.
    Where an environment makes the task, each row of the data is a question of its own."""
    asked = str(row.get("prompt"))
    return f"{asked} #{row.get('prompt_id')}" if "turns" in row else asked


def episode_row(completion: Completion, advantages: Sequence[float] | None = None) -> dict[str, Any]:
    """What a row says of a completion in which an environment answered; nothing of another one.

    ``turns`` are those of both sides, in order: ``role`` is ``assistant`` or ``environment``, ``tokens`` how many they
    have. The model's say how they ``ended``, which ``calls`` they made and what came of these, and ``reward`` and
    ``advantage`` where turns have their own. Results of calls stand there, and not a second time as an environment's
    ``text``. An environment's is ``cut`` where the model has read a part of what it says.
    """
    episode = completion.episode
    if episode is None:
        return {}
    turns: list[dict[str, Any]] = []
    end, text, cut = 0, episode.opening, False
    for place, turn in enumerate(episode.turns):
        turns += [_of_environment(text, turn.start - end, cut)] if text or turn.start > end else []
        said = {"role": "assistant", "text": turn.text, "tokens": turn.end - turn.start, "ended": turn.ended}
        said |= {"calls": [asdict(call) for call in turn.calls]} if turn.calls else {}
        said |= {"reward": turn.reward} if turn.reward is not None else {}
        said |= {"advantage": advantages[place]} if advantages is not None else {}
        turns.append(said)
        end, text, cut = turn.end, turn.observation, turn.cut
    tokens = len(completion.token_ids)
    turns += [_of_environment(text, tokens - end, cut)] if text or tokens > end else []
    failed = {"failure": episode.failure, "failure_message": episode.message} if episode.failure else {}
    return {"turns": turns, "environment_tokens": tokens - completion.num_model_tokens, **failed}


def _of_environment(text: str, tokens: int, cut: bool) -> dict[str, Any]:
    return {"role": "environment", "text": text, "tokens": tokens} | ({"cut": True} if cut else {})


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
