"""What ``evaluate`` makes of completions and their rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from grpo.evaluation.held_out import evaluate, held_out_metrics
from grpo.evaluation.statistics import wilson_interval
from grpo.metrics import question_of, rollout_rows
from grpo.types import Completion, Episode, Group, Prompt, Status, Turn
from tests.conftest import make_recipe
from tests.evaluation.test_statistics import by_plain_loops

RULES = [{"path": "unused.py:rule"}, {"path": "unused.py:always"}]


class Fixed:
    """A backend and a scorer whose completions and rewards are given: ``rewards[prompt id][sample]``."""

    def __init__(self, rewards: dict[int, list[float | None]]):
        self.rewards = rewards

    def generate(
        self, requests: list[Any], sampling: Any, version: int, on_group: Any = None
    ) -> list[list[Completion]]:
        return [[Completion([5, 1], [-0.5, -0.1], Status.STOP, "a", []) for _ in request.keys] for request in requests]

    def score(self, groups: list[Any], step: int) -> None:
        for group in groups:
            group.rewards = self.rewards[group.prompt.id]
            group.rewards_by_function = {"rule": group.rewards, "always": [1.0] * len(group.rewards)}


def test_evaluate_counts_solved_leaves_out_unscored_and_clusters_by_question() -> None:
    rewards: dict[int, list[float | None]] = {
        0: [1.0, 0.0],
        1: [0.99, 2.0],
        2: [None, 1.0],
        3: [0.0, 0.0],
        4: [1.0, 1.0],
    }
    questions = ["a", "b", "c", "a", "d"]
    prompts = [Prompt(i, question, f"template: {question}", [7, 8]) for i, question in enumerate(questions)]
    fixed = Fixed(rewards)
    recipe = make_recipe(Path("unused"), rewards=RULES, evaluation={"num_generations": 2})
    backend: Any = fixed
    metrics, rows = evaluate(recipe, prompts, backend, fixed, Accelerator(cpu=True), version=3)  # type: ignore[arg-type]
    solved_PG = np.array([[True, False], [False, True], [False, False], [True, True]])  # prompt 2 is left out
    low, high = by_plain_loops(solved_PG, ["a", "b", "a", "d"])
    assert metrics["eval/accuracy"] == 0.5
    assert (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]) == pytest.approx((low, high), abs=1e-12)
    assert metrics["eval/pass@2"] == 0.75
    assert (metrics["eval/unscored/rule"], metrics["eval/unscored/always"]) == (1.0, 0.0)
    assert metrics["eval/rewards/rule/mean"] == pytest.approx(sum([1, 0, 0.99, 2, 1, 0, 0, 1, 1]) / 9)
    assert [row["prompt_id"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_where_nothing_could_be_scored_nothing_is_solved() -> None:
    fixed: Any = Fixed({0: [None], 1: [None]})
    prompts = [Prompt(i, f"{i}", f"{i}", [7]) for i in range(2)]
    recipe = make_recipe(Path("unused"), rewards=RULES)
    metrics, _ = evaluate(recipe, prompts, fixed, fixed, Accelerator(cpu=True), version=0)
    assert (metrics["eval/accuracy"], metrics["eval/unscored/rule"]) == (0.0, 2.0)


def test_prompts_of_games_may_be_the_same_and_their_outcomes_are_independent_all_the_same() -> None:
    """An environment makes another task of each row; on the page and between runs too."""
    played = [Completion([5], [-0.5], Status.STOP, "a", [], Episode([Turn(0, 1, "stop", text="a")])) for _ in range(8)]
    groups = [
        Group(Prompt(i, "play", "play", [7]), [one], [float(i < 2)], {"environment": [float(i < 2)]})
        for i, one in enumerate(played)
    ]
    recipe = make_recipe(Path("unused"), environment={"name": "number_guess"}, rewards=[{"name": "environment"}])
    metrics = held_out_metrics(recipe, groups)
    assert (metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]) == wilson_interval(2, 8)
    assert len({question_of(row) for row in rollout_rows(groups, 0)}) == 8
    assert {question_of({"prompt": "play", "prompt_id": i}) for i in range(8)} == {"play"}
