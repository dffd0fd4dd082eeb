"""A stage's figures, from completions of several seeds."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.errors import RunError
from grpo.evaluation.statistics import wilson_interval
from grpo.pipeline.measure import figures_of


def row(seed: int, prompt: int, solved: float | None, form: float | None = -0.5, tokens: int = 10) -> dict[str, Any]:
    return {
        "seed": seed,
        "prompt_id": prompt,
        "prompt": f"question {prompt}",
        "num_tokens": tokens,
        "status": "length" if tokens > 20 else "stop",
        "rewards": {"countdown": solved, "form": form},
    }


def test_accuracy_length_and_form() -> None:
    rows = [row(0, 1, 1.0, -1.0), row(0, 2, 0.0, 0.0), row(0, 3, None, -0.5), row(1, 4, 0.5, -0.5, tokens=30)]
    found = figures_of(rows, "countdown", "form")
    assert found["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert (found["tasks"], found["unscored_tasks"], found["completions"]) == (3, 1, 4)
    low, high = wilson_interval(1, 3)
    assert (found["accuracy_low"], found["accuracy_high"]) == pytest.approx((low, high), abs=1e-6)
    assert (found["length"], found["cut_off"]) == (15.0, 0.25)
    assert [of["seed"] for of in found["by_seed"]] == [0, 1]
    assert [of["accuracy"] for of in found["by_seed"]] == [0.5, 0.0]
    # Of any range: the interval is about its mean, and cut to what was seen.
    assert found["form"] == -0.5
    assert -1 <= found["form_low"] < -0.5 < found["form_high"] <= 0
    assert found["form_low"] + found["form_high"] == pytest.approx(-1)


def test_a_question_of_two_seeds_counts_once() -> None:
    """Its outcomes go together: the interval is wider than of as many questions."""
    pairs = [(seed, place) for place in range(20) for seed in (0, 1)]
    apart = figures_of([row(seed, 2 * place + seed, place % 2) for seed, place in pairs], "countdown", None)
    twice = figures_of([row(seed, place, place % 2) for seed, place in pairs], "countdown", None)
    assert apart["accuracy"] == twice["accuracy"] == 0.5
    assert "form" not in twice
    width = [found["accuracy_high"] - found["accuracy_low"] for found in (apart, twice)]
    assert width[1] > 1.2 * width[0]


def test_where_nothing_could_be_scored() -> None:
    with pytest.raises(RunError, match="countdown could score no completion"):
        figures_of([row(0, 1, None)], "countdown", None)
