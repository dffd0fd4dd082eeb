"""Rules of health: each with a run that it names and one that comes near and is left alone."""

from __future__ import annotations

import pytest

from grpo.config.health import HealthConfig
from grpo.health.history import FIRST, LAST, Row
from grpo.health.rules import RULES, STEPS
from grpo.health.watch import Demand, Watch, sentence

HEALTHY: dict[str, float] = {
    "reward": 0.4,
    "frac_reward_zero_std": 0.3,
    "completions/unique_ratio": 0.9,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "verdicts/countdown/wrong": 20.0,
    "verdicts/countdown/correct": 12.0,
    "entropy": 0.5,
    "kl": 0.01,
    "clip_ratio/region_mean": 0.02,
    "sampling/sampling_logp_difference/mean": 0.01,
    "grad_norm": 0.3,
    "time/score": 0.2,
    "step_time": 4.0,
    "frac_unscored": 0.0,
}


def steps(count: int, **changed: float) -> list[dict[str, float]]:
    """``count`` steps of a healthy run but for some metrics, whose names have ``__`` for a slash."""
    return [HEALTHY | {name.replace("__", "/"): value for name, value in changed.items()} for _ in range(count)]


def evaluation(accuracy: float, half: float = 0.04) -> dict[str, float]:
    return {"eval/accuracy": accuracy, "eval/accuracy_low": accuracy - half, "eval/accuracy_high": accuracy + half}


def numbered(rows: list[dict[str, float]]) -> list[Row]:
    step, found = 0, []
    for row in rows:
        step += "reward" in row
        found.append({"step": float(step)} | row)
    return found


def never(correct: float, count: int = 4 * STEPS) -> list[dict[str, float]]:
    return steps(count, verdicts__countdown__correct=correct)


def test_a_form_that_is_found_is_no_correct_answer() -> None:
    rows = steps(4 * STEPS, verdicts__countdown__correct=0.0, verdicts__format__correct=30.0)
    assert "never_correct" in held(rows)
    assert "never_correct" not in held(steps(4 * STEPS, verdicts__format__correct=30.0))


def falling(reward: float, accuracy: float) -> list[dict[str, float]]:
    return [evaluation(0.5), *steps(2 * STEPS), evaluation(0.6), *steps(STEPS, reward=reward), evaluation(accuracy)]


FAILING: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
    "no_signal": (steps(STEPS, frac_reward_zero_std=0.97), steps(STEPS, frac_reward_zero_std=0.93)),
    "all_alike": (
        steps(STEPS, completions__unique_ratio=0.2, frac_reward_zero_std=0.65),
        steps(STEPS, completions__unique_ratio=0.4, frac_reward_zero_std=0.65),
    ),
    "never_correct": (never(0.0), [*never(0.0), *never(1.0, 1)][-4 * STEPS :]),
    "accuracy_below_start": (
        [evaluation(0.5), *steps(3), evaluation(0.4)],
        [evaluation(0.5), *steps(3), evaluation(0.43)],
    ),
    "reward_without_accuracy": (falling(0.6, 0.45), falling(0.35, 0.45)),
    "length_collapse": (
        [*steps(STEPS), *steps(STEPS, completions__mean_length=20, reward=0.4)],
        [*steps(STEPS), *steps(STEPS, completions__mean_length=20, reward=0.5)],
    ),
    "entropy_collapse": ([*steps(STEPS), *steps(STEPS, entropy=0.01)], [*steps(STEPS), *steps(STEPS, entropy=0.03)]),
    "cut_off": (steps(STEPS, completions__clipped_ratio=0.6), steps(STEPS, completions__clipped_ratio=0.45)),
    "kl_blow_up": (steps(STEPS, kl=2.0), steps(STEPS, kl=0.8)),
    "clipped": (steps(STEPS, clip_ratio__region_mean=0.4), steps(STEPS, clip_ratio__region_mean=0.25)),
    "sampler_mismatch": (
        steps(STEPS, sampling__sampling_logp_difference__mean=0.2),
        steps(STEPS, sampling__sampling_logp_difference__mean=0.08),
    ),
    "gradient": ([*steps(2 * STEPS), *steps(1, grad_norm=9.0)], [*steps(2 * STEPS), *steps(1, grad_norm=4.0)]),
    "slow_reward": (steps(STEPS, time__score=3.0), steps(STEPS, time__score=1.9)),
    "unscored": (steps(STEPS, frac_unscored=0.1), steps(STEPS, frac_unscored=0.04)),
}


def held(rows: list[dict[str, float]]) -> set[str]:
    watch = Watch()
    watch.see_all(numbered(rows))
    return set(watch.holding)


def test_every_rule_has_a_key_of_the_recipe_and_a_case() -> None:
    names = [rule.name for rule in RULES]
    assert [*names, "max_rollbacks"] == list(HealthConfig.model_fields)
    assert names == list(FAILING)


@pytest.mark.parametrize("name", FAILING)
def test_a_rule_names_the_run_that_fails_and_leaves_the_near_one_alone(name: str) -> None:
    failing, near = FAILING[name]
    assert name in held(failing)
    assert name not in held(near)


@pytest.mark.parametrize("name", [n for n in FAILING if "accuracy" not in n and n not in ("never_correct", "gradient")])
def test_a_finding_of_fewer_steps_is_left_alone(name: str) -> None:
    failing, _ = FAILING[name]
    assert name not in held(failing[:-1])


def test_a_healthy_run_is_silent() -> None:
    rows = [evaluation(0.4), *steps(60), evaluation(0.45), *steps(60), evaluation(0.5)]
    assert Watch().see_all(numbered(rows)) == []


def test_a_metric_that_is_not_logged_or_not_a_number_says_nothing() -> None:
    without = [{"reward": 0.4, "loss": 1.0}] * 30
    assert held(without) == set()
    assert held([row | dict.fromkeys(HEALTHY) for row in without]) == set()  # type: ignore[list-item, misc]


def test_a_rule_begins_once_and_ends_once() -> None:
    rows = numbered([*steps(STEPS), *steps(2 * STEPS, kl=3.0), *steps(2 * STEPS)])
    changes = Watch().see_all(rows)
    assert [(change.rule.name, change.statement is not None) for change in changes] == [
        ("kl_blow_up", True),
        ("kl_blow_up", False),
    ]
    assert changes[0].step < changes[1].step
    assert "2." in changes[0].text() or "1." in changes[0].text(), "the figure is said"
    assert "Lower optimizer.learning_rate" in changes[0].text()


def test_what_a_rule_does_is_the_recipes_choice() -> None:
    rows = numbered(steps(STEPS, kl=3.0, frac_unscored=0.2))
    watch = Watch({"kl_blow_up": "off", "unscored": "stop", "max_rollbacks": 2})
    watch.see_all(rows)
    assert set(watch.holding) == {"unscored"}
    assert watch.metrics() == {"health/unscored": 1.0}
    assert watch.demand() == Demand("stop", "unscored", "20% of completions have no reward, over 5 steps")
    for actions, demanded in (
        ({}, None),
        ({"kl_blow_up": "rollback"}, ("rollback", "kl_blow_up")),
        ({"kl_blow_up": "rollback", "unscored": "stop"}, ("stop", "unscored")),
    ):
        other = Watch(actions)
        other.see_all(rows)
        found = other.demand()
        assert (found and (found.action, found.rule)) == demanded


ROLLBACK: Row = {"step": 8.0, "rollback/to_step": 2.0, "rollback/count": 1.0, "rollback/kl_blow_up": 1.0}


def test_a_rollback_ends_every_rule_and_what_was_before_it_counts_no_more() -> None:
    watch = Watch({"kl_blow_up": "rollback"})
    rows = numbered([evaluation(0.6), *steps(2), evaluation(0.6), *steps(STEPS, kl=9.0), evaluation(0.1)])
    watch.see_all(rows)
    assert set(watch.holding) == {"kl_blow_up", "accuracy_below_start"}
    ended = watch.see(ROLLBACK)
    assert {(change.rule.name, change.statement) for change in ended} == {
        ("kl_blow_up", None),
        ("accuracy_below_start", None),
    }
    assert watch.demand() is None
    assert watch.see_all(steps(STEPS - 1, kl=9.0)) == []
    assert [change.rule.name for change in watch.see_all(steps(1, kl=9.0))] == ["kl_blow_up"]


def test_answers_of_before_a_rollback_are_not_counted_as_wrong_after_it() -> None:
    watch = Watch()
    watch.see_all(numbered(never(0.0)))
    assert "never_correct" in watch.holding
    watch.see(ROLLBACK)
    watch.see_all(never(0.0, 4 * STEPS - 1))
    assert not watch.holding
    watch.see_all(never(0.0, 1))
    assert "never_correct" in watch.holding


def test_the_start_is_remembered_through_a_rollback() -> None:
    watch = Watch()
    watch.see_all([*numbered(steps(STEPS)), ROLLBACK, *steps(2 * STEPS, completions__mean_length=10.0)])
    assert "length_collapse" in watch.holding


def test_memory_is_bounded_and_the_start_is_not_forgotten() -> None:
    watch = Watch()
    watch.see_all(numbered([*steps(STEPS), *steps(5 * LAST)]))
    assert len(watch.history.recent) == LAST
    assert len(watch.history.at_start) == FIRST
    watch.see_all(numbered(steps(STEPS, completions__mean_length=10.0)))
    assert "length_collapse" in watch.holding


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_cause_and_cure_are_sentences(rule) -> None:
    for text in (rule.cause, rule.cure):
        assert not text.endswith("."), "the message adds it"
        assert len(text) > 20


def test_a_key_of_the_recipe_keeps_its_small_letter_at_the_beginning_of_a_sentence() -> None:
    assert sentence("lower optimizer.learning_rate") == "Lower optimizer.learning_rate"
    assert sentence("optimizer.max_grad_norm clips it") == "optimizer.max_grad_norm clips it"


def test_short_answers_that_are_alike_and_still_teach_are_no_failure() -> None:
    """One liners at step 37: 0.19 of a group's completions differ, and 0.47 of the groups have no signal."""
    assert not held(steps(STEPS, completions__unique_ratio=0.19, frac_reward_zero_std=0.47))
