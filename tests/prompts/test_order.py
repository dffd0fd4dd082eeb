"""The curriculum: how often rows come by their pass rates, what rates become, that none starves; exact on resume."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo.config import PromptsConfig
from grpo.prompts.order import curriculum, curriculum_metrics, prompts_of_step, updated_pass_rates
from grpo.types import Group, Prompt
from tests.small_runs import lines, progress, same_weights, small_run

ON = PromptsConfig(curriculum=True)


def judge(source: str) -> str:
    return "right"


def group(row: int, *rewards: float | None) -> Group:
    return Group(Prompt(row, "", "", []), [], [], {"right": list(rewards), "other": [0.0] * len(rewards)})


# --- the order ---


def test_rows_come_in_proportion_to_their_weights() -> None:
    """First draws of 6,000 steps: of rows solved never, always, half of the time, 0.9 of it, and one not yet seen."""
    rates = {10: 0.0, 11: 1.0, 12: 0.5, 13: 0.9}
    steps = 6000
    first = Counter(curriculum(ON, [10, 11, 12, 13, 14], rates, 0, step)[0] for step in range(steps))
    weights = {10: 0.1, 11: 0.1, 12: 1.0, 13: 0.1 + 0.9 * 4 * 0.9 * 0.1, 14: 1.0}
    for row, weight in weights.items():
        share = weight / sum(weights.values())
        sigma = np.sqrt(share * (1 - share) / steps)
        assert first[row] / steps == pytest.approx(share, abs=4 * sigma)


def test_the_second_row_is_drawn_from_those_left_in_proportion_too() -> None:
    rates = {0: 0.0, 1: 0.5, 2: 0.9}
    weights = [0.1, 1.0, 0.1 + 0.9 * 4 * 0.09]
    steps = 6000
    second = Counter(curriculum(ON, [0, 1, 2], rates, 1, step)[1] for step in range(steps))
    for row in range(3):
        share = sum(
            weights[first] / sum(weights) * weights[row] / (sum(weights) - weights[first])
            for first in range(3)
            if first != row
        )
        assert second[row] / steps == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / steps))


def test_no_row_starves() -> None:
    """A hundred rows solved always and ten half of the time, four drawn a step: every one comes within 1,000 steps."""
    rates = dict.fromkeys(range(100), 1.0) | dict.fromkeys(range(100, 110), 0.5)
    seen = Counter(row for step in range(1000) for row in curriculum(ON, range(110), rates, 0, step)[:4])
    assert len(seen) == 110
    assert min(seen[row] for row in range(100, 110)) > max(seen[row] for row in range(100))


def test_the_order_is_a_function_of_seed_step_and_rates() -> None:
    orders = [
        tuple(curriculum(ON, range(50), rates, seed, step))
        for rates, seed, step in [({}, 0, 0), ({}, 0, 0), ({}, 1, 0), ({}, 0, 1), ({3: 0.0}, 0, 0)]
    ]
    assert orders[0] == orders[1]
    assert len({orders[0], orders[2], orders[3]}) == 3
    assert all(sorted(order) == list(range(50)) for order in orders)
    without_3 = [[row for row in orders[i] if row != 3] for i in (0, 4)]
    assert without_3[0] == without_3[1], "what is learned of a row moves that row alone"


def test_a_floor_of_one_is_a_uniform_draw() -> None:
    flat = PromptsConfig(curriculum=True, curriculum_floor=1.0)
    assert curriculum(flat, range(30), {3: 0.0, 7: 0.5}, 0, 0) == curriculum(flat, range(30), {}, 0, 0)


class FakeTask:
    """Rows 0 to 9 in their order, epoch after epoch."""

    train = SimpleNamespace(shares=[SimpleNamespace(ids=range(10))])
    prompts_per_step, seed = 4, 0

    def rows_at(self, start: int) -> list[int]:
        return [(start + i) % 10 for i in range(4)]

    def sources_at(self, start: int) -> list[int]:
        return [0] * 4

    def prompt(self, part: Any, row: int) -> Prompt:
        return Prompt(row, "", "", [])


def drawn(number: int, step: int, **keys: Any) -> list[int]:
    task: Any = FakeTask()
    stream = prompts_of_step(keys.pop("config", PromptsConfig()), task, step, **{"extra": 0, "pass_rates": {}, **keys})
    return [prompt.id for prompt in islice(stream, number)]


def test_epoch_by_epoch_a_step_goes_on_where_the_one_before_stopped() -> None:
    assert drawn(4, 0) == [0, 1, 2, 3]
    assert drawn(9, 1) == [4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert drawn(4, 2, extra=5) == [3, 4, 5, 6]


def test_a_step_of_the_curriculum_draws_every_row_once_before_any_twice() -> None:
    rows = drawn(20, 3, config=ON, pass_rates={2: 1.0})
    assert sorted(rows[:10]) == list(range(10))
    assert rows[10:] == rows[:10]


def test_rows_that_are_asked_for_already_are_behind_a_step_and_come_last_in_the_curriculum() -> None:
    assert drawn(4, 1, ahead=[4, 5, 6]) == [7, 8, 9, 0]
    assert drawn(4, 2, extra=5, ahead=[3, 4]) == [5, 6, 7, 8]
    rows = drawn(10, 3, config=ON)
    assert drawn(10, 3, config=ON, ahead=rows[2:4]) == [*rows[:2], *rows[4:], *rows[2:4]]
    assert drawn(10, 3, config=ON, ahead=range(10)) == rows, "in a small data set all may be ahead"


# --- what is learned ---


def test_a_pass_rate_is_the_mean_over_visits_the_newest_counting_most() -> None:
    rates = updated_pass_rates({}, [group(1, 1, 0, 0, 0), group(2, 1, 1, 1, 1)], judge, 0.5)
    assert rates == {1: 0.25, 2: 1.0}
    rates = updated_pass_rates(rates, [group(1, 1, 1, 1, 0)], judge, 0.5)
    assert rates == {1: 0.5, 2: 1.0}
    assert updated_pass_rates(rates, [group(2, 0, 0, 0, 0)], judge, 0.25) == {1: 0.5, 2: 0.75}
    assert updated_pass_rates(rates, [group(2, 0, 0, 0, 0)], judge, 1.0) == {1: 0.5, 2: 0.0}


def test_what_could_not_be_scored_is_left_out_and_partial_rewards_stay_within_0_and_1() -> None:
    rates = updated_pass_rates({}, [group(1, 1, None, 0, None), group(2, None, None), group(3, -2, 3)], judge, 0.5)
    assert rates == {1: 0.5, 3: 0.5}


def test_a_prompt_that_came_twice_in_a_step_is_updated_twice() -> None:
    assert updated_pass_rates({}, [group(1, 1, 1), group(1, 0, 0)], judge, 0.5) == {1: 0.5}


def test_metrics_say_how_much_was_seen() -> None:
    assert curriculum_metrics({1: 0.5, 2: 1.0}, 8) == {"curriculum/frac_seen": 0.25, "curriculum/pass_rate": 0.75}
    assert curriculum_metrics({}, 8) == {"curriculum/frac_seen": 0.0, "curriculum/pass_rate": 0.0}


# --- whole runs ---


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    return lambda name, **keys: small_run(tiny_model, tmp_path / name, monkeypatch, **keys)


@pytest.mark.slow
def test_a_run_draws_by_what_it_has_learned_and_resumes_to_the_same_bits(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"prompts": {"curriculum": True}, "train_size": 8, "steps": 8}
    whole = run("whole", **keys)
    held = progress(tmp_path / "whole", 8)["pass_rates"]
    assert set(held) == {prompt for _, prompts in whole for prompt in prompts}
    expected: dict[int, float] = {}
    for step in range(1, 9):  # from what was logged
        rows = [json.loads(x) for x in (tmp_path / f"whole/rollouts/step_{step:06d}.jsonl").open()]
        for start in range(0, len(rows), 4):
            rate = sum(row["reward"] for row in rows[start : start + 4]) / 4
            prompt = rows[start]["prompt_id"]
            expected[prompt] = (rate + expected.get(prompt, rate)) / 2
    assert held == pytest.approx(expected)

    run("cut", **{**keys, "steps": 3})
    rest = run("cut", **keys, resume=True)
    assert rest == whole[3:]
    assert lines(tmp_path / "cut")[3:] == lines(tmp_path / "whole")[3:]
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    uniform = run("uniform", **{**keys, "prompts": {}})
    assert uniform != whole
