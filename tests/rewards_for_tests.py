"""Reward functions that an untrained model gets different rewards from, so that runs in tests have a gradient."""

from __future__ import annotations


def share_of_small_numbers(completions: list[str], **_: object) -> list[float]:
    """Share of words that are numbers under 50."""
    return [sum(w.isdigit() and int(w) < 50 for w in c.split()) / max(1, len(c.split())) for c in completions]


def length_divides_by_eight(completions: list[str], **_: object) -> list[float]:
    """1 or 0, by luck: of an untrained model's groups of four about every second one has both."""
    return [float(len(c) % 8 == 0) for c in completions]


def always_one(completions: list[str], **_: object) -> list[float]:
    """No group ever has a signal."""
    return [1.0] * len(completions)


def logs_the_trainers_names(completions, completion_ids, log_metric, **_):
    """``length_divides_by_eight``, under the trainer's own names for metrics."""
    for name in ("step", "reward", "eval/accuracy", "mean", "num_tokens"):
        log_metric(name, 99)
    return length_divides_by_eight(completions, completion_ids=completion_ids)
