"""Rounds of drawing until a step has its groups with a signal: which are drawn, chosen and counted; exact on resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo.config import AlgorithmConfig
from grpo.errors import BackendFailed
from grpo.rollout.groups import choose, has_signal, round_size
from grpo.types import Completion, Group, Prompt, Status
from tests.conftest import make_recipe
from tests.small_runs import lines, progress, same_weights, small_run

G = 4
Run = Callable[..., list[tuple[int, list[int]]]]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda name, **keys: small_run(tiny_model, tmp_path / name, monkeypatch, **keys)


def group(prompt_id: int, *rewards: float | None, status: Status = Status.STOP) -> Group:
    completions = [Completion([1], [-1.0], status, "", []) for _ in rewards]
    return Group(Prompt(prompt_id, "", "", [1]), completions, list(rewards), {"f": list(rewards)})


def ids(groups: list[Group]) -> list[int]:
    return [group.prompt.id for group in groups]


# --- how many, and which ---


@pytest.mark.parametrize(
    ("wanted", "drawn", "with_signal", "size"),
    [
        (32, 0, 0, 32),  # the first round
        (32, 32, 0, 32),  # nothing yet: as many again
        (32, 32, 16, 32),  # every second one: twice what is missing
        (32, 32, 31, 2),
        (32, 96, 30, 7),  # 2 x 96 / 30 = 6.4
        (32, 32, 1, 32),  # never more than the first time
    ],
)
def test_a_round_draws_what_should_give_what_is_missing(wanted: int, drawn: int, with_signal: int, size: int) -> None:
    assert round_size(wanted, drawn, with_signal) == size


def test_the_first_groups_with_a_signal_are_chosen_in_the_order_drawn() -> None:
    sampled = [group(i, 1, 0) for i in range(6)]
    drawn = choose(sampled, [False, True, True, False, True, True], [], wanted=3, rounds=2)
    assert ids(drawn.groups) == [1, 2, 4]
    assert ids(drawn.with_signal) == [1, 2, 4, 5]
    assert drawn.sampled is sampled
    assert drawn.metrics() == {
        "dynamic_sampling/rounds": 2,
        "dynamic_sampling/groups_drawn": 6,
        "dynamic_sampling/groups_kept": 3,
        "dynamic_sampling/groups_discarded": 3,
        "dynamic_sampling/groups_replayed": 0,
        "dynamic_sampling/groups_without_signal": 0,
    }


def test_where_too_few_have_a_signal_the_first_without_fill_up() -> None:
    sampled = [group(i, 1, 0) for i in range(6)]
    drawn = choose(sampled, [False, True, False, False, False, True], [], wanted=4, rounds=3)
    assert ids(drawn.groups) == [0, 1, 2, 5]
    assert drawn.metrics()["dynamic_sampling/groups_without_signal"] == 2
    assert drawn.metrics()["dynamic_sampling/groups_discarded"] == 2


def test_replayed_groups_fill_up_before_those_without_a_signal_newest_first() -> None:
    sampled = [group(i, 1, 0) for i in range(4)]
    replay = [group(10 + i, 1, 0) for i in range(3)]
    drawn = choose(sampled, [False, True, False, False], replay, wanted=4, rounds=1)
    assert ids(drawn.groups) == [1, 12, 11, 10]
    drawn = choose(sampled, [False, True, False, False], replay[:2], wanted=4, rounds=1)
    assert ids(drawn.groups) == [0, 1, 11, 10]
    assert drawn.metrics()["dynamic_sampling/groups_replayed"] == 2
    assert drawn.metrics()["dynamic_sampling/groups_without_signal"] == 1
    assert ids(choose(sampled, [True] * 4, replay, wanted=4, rounds=1).groups) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({}, [True, False, False, False, True, True]),
        ({"mask_truncated_completions": True}, [True, False, False, False, True, False]),
        ({"pass_at_k": 3}, [False, False, False, False, True, False]),  # with two wrong of four, three always pass
        ({"baseline": "batch", "scale_rewards": "none"}, [True] * 3 + [False] + [True] * 2),
    ],
)
def test_a_group_has_a_signal_where_a_completion_that_counts_has_an_advantage(
    algorithm: dict[str, Any], expected: list[bool]
) -> None:
    groups = [
        group(0, 1, 0, 1, 0),
        group(1, 1, 1, 1, 1),
        group(2, 0.1, 0.1, 0.1, 0.1),
        group(3, None, None, None, None),
        group(4, 0, 0, 0, 1),
        group(5, 1, 0, 1, 0, status=Status.LENGTH),
    ]
    assert has_signal(groups, [1.0], AlgorithmConfig(**algorithm)) == expected


# --- whole runs ---


@pytest.mark.slow
def test_a_run_draws_on_until_its_steps_have_their_groups(run: Run, tmp_path: Path) -> None:
    calls = run("run", prompts={"dynamic_sampling": True, "max_resample": 6})
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        asked = [prompts for version, prompts in calls if version == row["step"] - 1]
        assert len(asked) == row["dynamic_sampling/rounds"]
        assert sum(map(len, asked)) == row["dynamic_sampling/groups_drawn"]
        kept, silent = row["dynamic_sampling/groups_kept"], row["dynamic_sampling/groups_without_signal"]
        assert kept + silent == 4
        assert silent == 0 or row["dynamic_sampling/rounds"] == 7
        trained = [json.loads(x) for x in (tmp_path / f"run/rollouts/step_{row['step']:06d}.jsonl").open()]
        groups = [trained[i : i + G] for i in range(0, len(trained), G)]
        assert [any(r["advantage"] for r in g) for g in groups].count(True) == kept
    assert sum(row["dynamic_sampling/rounds"] for row in rows) > 6, "some step drew again"
    assert sum(row["dynamic_sampling/groups_kept"] for row in rows) == 24, "and got what it wanted"


@pytest.mark.slow
def test_prompts_come_epoch_by_epoch_whatever_steps_draw(run: Run, tmp_path: Path) -> None:
    calls = run("run", prompts={"dynamic_sampling": True}, steps=5, train_size=11)
    stream = [prompt for _, prompts in calls for prompt in prompts]
    assert len(stream) > 22
    for start in range(0, len(stream) - 10, 11):
        assert len(set(stream[start : start + 11])) == 11, "each epoch has every row once"


@pytest.mark.slow
def test_where_all_groups_have_a_signal_nothing_changes(run: Run, tmp_path: Path) -> None:
    plain = run("plain", steps=3, reward="share_of_small_numbers")
    dynamic = run("dynamic", steps=3, reward="share_of_small_numbers", prompts={"dynamic_sampling": True})
    assert plain == dynamic
    assert same_weights(tmp_path / "plain", tmp_path / "dynamic")
    for one, two in zip(lines(tmp_path / "plain"), lines(tmp_path / "dynamic"), strict=True):
        assert one.items() <= two.items()
        assert two["dynamic_sampling/rounds"] == 1


def test_prompts_that_come_twice_in_a_step_get_fresh_samples(run: Run, tmp_path: Path) -> None:
    """Four rows, all drawn in every round: the completions of a later round are others."""
    run("run", prompts={"dynamic_sampling": True}, steps=1, train_size=4, reward="always_one")
    (row,) = lines(tmp_path / "run")
    assert row["dynamic_sampling/groups_drawn"] == 20
    assert row["dynamic_sampling/groups_without_signal"] == 4
    assert row["completions/mean_length"] > 0
    assert row["num_tokens"] > 0
    assert "grad_norm" not in row, "no signal, no optimizer step"


@pytest.mark.slow
@pytest.mark.parametrize("fails_at", [4, 5, 9], ids=lambda n: f"at call {n}")
@pytest.mark.parametrize(
    "prompts",
    [
        {"dynamic_sampling": True},
        {"dynamic_sampling": True, "curriculum": True, "replay_groups": 3, "max_resample": 1},
    ],
    ids=["dynamic", "all of it"],
)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(
    run: Run, tmp_path: Path, prompts: dict[str, Any], fails_at: int
) -> None:
    """Also in mid-step, between two rounds: what the step had drawn is drawn again."""
    whole = run("whole", prompts=prompts)
    with pytest.raises(BackendFailed):
        run("cut", prompts=prompts, fails_at=fails_at)
    step = int(max((tmp_path / "cut/checkpoints").iterdir()).name[-6:])
    assert 0 < step < 6
    rest = run("cut", prompts=prompts, resume=True)
    assert rest == [call for call in whole if call[0] >= step]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert same_weights(tmp_path / "cut", tmp_path / "whole")
    assert progress(tmp_path / "cut", 6)["extra_prompts"] == sum(len(p) for _, p in whole) - 24


@pytest.mark.slow
def test_without_what_a_checkpoint_holds_of_prompts_a_resumed_run_would_differ(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the test above can fail."""
    from grpo.run import run as run_module

    prompts = {"dynamic_sampling": True}
    whole = run("whole", prompts=prompts)
    with pytest.raises(BackendFailed):
        run("cut", prompts=prompts, fails_at=9)
    restore = run_module.restore_state

    def forgetful(*arguments: Any) -> Any:
        found = restore(*arguments)
        found.extra_prompts = 0
        return found

    monkeypatch.setattr(run_module, "restore_state", forgetful)
    rest = run("cut", prompts=prompts, resume=True)
    assert rest != whole[-len(rest) :]


# --- what does not go together ---


def test_replay_is_refused_where_the_sampler_cuts_its_distribution() -> None:
    with pytest.raises(ValueError, match=r"prompts\.replay_groups needs importance ratios"):
        make_recipe(Path("tiny"), prompts={"replay_groups": 8}, rollout={"top_p": 0.9})


def test_pass_at_k_needs_more_completions_than_k() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.pass_at_k \(8\) must be below rollout\.num_generations \(8\)"):
        make_recipe(Path("tiny"), algorithm={"pass_at_k": 8})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"baseline": "batch"}, "set scale_rewards to batch or none"),
        ({"baseline": "none", "scale_rewards": "batch"}, "set scale_rewards to none"),
        (
            {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"},
            "scale_rewards cannot be used",
        ),
        ({"multi_objective_aggregation": "normalize_then_sum", "pass_at_k": 2}, "pass_at_k cannot be used"),
        ({"pass_at_k": 2, "scale_rewards": "batch"}, "pass_at_k needs scale_rewards"),
        ({"pass_at_k": 2, "scale_rewards": "none", "baseline": "none"}, "pass_at_k needs a baseline of the group"),
    ],
)
def test_advantages_that_contradict_each_other_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_recipe(Path("tiny"), algorithm=keys)
