"""Runs over several sources: each completion is scored by its source's rewards; metrics by source; exact on resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo import sft
from grpo.errors import BackendFailed, UserError
from grpo.run.folder import release_run_folder
from grpo.run.read import read_rollouts
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt, Status
from tests.conftest import make_recipe
from tests.launching import ROOT
from tests.prompts.small_rows import write_rows
from tests.small_runs import lines, progress, same_weights, small_run

REWARDS = f"{ROOT}/tests/rewards_for_tests.py"
COMPACT = {"name": "countdown", "args": {"question": "compact"}, "train_size": 24}


def mix(**second: Any) -> dict[str, Any]:
    """Two tasks, of weights 3 and 1, with rewards that the tiny model gets by luck."""
    return {
        "mix": [
            COMPACT | {"weight": 3, "eval_size": 3, "rewards": [{"path": f"{REWARDS}:length_divides_by_eight"}]},
            COMPACT
            | {
                "label": "small",
                "args": {"question": "compact", "seed": 5},
                "eval_size": 2,
                "rewards": [{"path": f"{REWARDS}:share_of_small_numbers", "weight": 2.0}],
                **second,
            },
        ]
    }


BOTH: dict[str, Any] = {"data": mix(), "rewards": [{"path": f"{REWARDS}:always_one", "weight": 0.5}]}


def test_a_completion_is_scored_by_its_sources_rewards_alone(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, **BOTH)
    groups = [
        Group(
            Prompt(i, "", "", [], columns={"nums": [1], "target": 1}, source=source),
            [Completion([1], [0.0], Status.STOP, text, []) for text in ("12345678", "7 9 80")],
        )
        for i, source in enumerate(("countdown", "small"))
    ]
    with Scorer(recipe.functions(), recipe.scoring) as scorer:
        assert (
            scorer.names == recipe.reward_names() == ["always_one", "length_divides_by_eight", "share_of_small_numbers"]
        )
        scorer.score(groups, 0)
    assert groups[0].rewards_by_function == {
        "always_one": [1.0, 1.0],
        "length_divides_by_eight": [1.0, 0.0],
        "share_of_small_numbers": [None, None],
    }
    assert groups[0].rewards == [1.5, 0.5]
    assert groups[0].verdicts["share_of_small_numbers"] == {}, "not asked, so not unscored"
    assert groups[1].rewards_by_function["length_divides_by_eight"] == [None, None]
    assert groups[1].rewards == pytest.approx([0.5, 0.5 + 2 * 2 / 3])


def test_only_the_sources_rewards_need_its_columns(tmp_path: Path) -> None:
    data = {"mix": [COMPACT | {"rewards": [{"name": "countdown"}]}, {"path": "x.jsonl", "rewards": [{"name": "math"}]}]}
    recipe = make_recipe(tmp_path, data=data, rewards=[])
    with Scorer(recipe.functions(), recipe.scoring) as scorer:
        scorer.check_columns({"countdown": ["nums", "target"], "x": ["answer"]})
        with pytest.raises(UserError, match=r"needs answer: neither a column of the rows of x"):
            scorer.check_columns({"countdown": ["nums", "target"], "x": ["gold"]})


@pytest.mark.slow
def test_metrics_and_rollouts_by_source(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tiny_model, tmp_path / "run", monkeypatch, steps=3, **BOTH)
    rows = lines(tmp_path / "run")
    steps = [row for row in rows if "reward" in row]
    for row in steps:
        assert (row["sources/countdown/prompts"], row["sources/small/prompts"]) == (3, 1)
        parts = [row["sources/countdown/reward"], row["sources/small/reward"]]
        assert row["reward"] == pytest.approx((3 * parts[0] + parts[1]) / 4)
        assert row["sources/countdown/reward"] == pytest.approx(0.5 + row["rewards/length_divides_by_eight/mean"])
        assert row["sources/countdown/accuracy"] == pytest.approx(row["rewards/length_divides_by_eight/mean"])
        assert row["sources/small/reward"] == pytest.approx(0.5 + 2 * row["rewards/share_of_small_numbers/mean"])
        assert {"sources/small/frac_reward_zero_std", "sources/small/mean_length"} <= row.keys()
    evaluated = [row for row in rows if "eval/accuracy" in row]
    assert len(evaluated) == 2
    for row in evaluated:
        parts = [row["eval/sources/countdown/accuracy"], row["eval/sources/small/accuracy"]]
        assert row["eval/accuracy"] == pytest.approx((3 * parts[0] + 2 * parts[1]) / 5)
        assert row["eval/unscored/length_divides_by_eight"] == row["eval/unscored/share_of_small_numbers"] == 0
    file = tmp_path / "run/rollouts/eval_000003.jsonl"
    assert {(row["source"], row["judged_by"]) for row in read_rollouts(file)} == {
        ("countdown", "length_divides_by_eight"),
        ("small", "share_of_small_numbers"),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts",
    [
        {"dynamic_sampling": True, "max_resample": 2, "replay_groups": 4},
        {"curriculum": True, "dynamic_sampling": True, "max_resample": 1},
    ],
    ids=["drawn on and replayed", "curriculum"],
)
def test_exact_on_resume(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: dict[str, Any]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    often = {"training": {"save_every": 2, "eval_every": 0}, "evaluation": {"at_start": False}, "prompts": prompts}
    calls = small_run(tiny_model, straight, monkeypatch, steps=4, **BOTH, **often)
    with pytest.raises(BackendFailed):
        small_run(tiny_model, broken, monkeypatch, fails_at=len(calls) - 2, steps=4, **BOTH, **often)
    small_run(tiny_model, broken, monkeypatch, resume=True, steps=4, **BOTH, **often)
    assert same_weights(straight, broken)
    assert lines(straight) == lines(broken)
    assert {row["sources/small/prompts"] for row in lines(straight) if "sources/small/prompts" in row}
    if "curriculum" in prompts:
        sources = {row >= 24 for row in progress(straight, 4)["pass_rates"]}
        assert sources == {False, True}, "of both sources pass rates are known"


@pytest.mark.slow
def test_supervised_loss_by_source(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "write_report_at_end", lambda folder: None)  # takes seconds
    mix = [
        {"path": write_rows(tmp_path / f"{name}.jsonl", rows), "eval_size": 3}
        for name, rows in (
            ("digits", [{"prompt": f"{i} = ", "completion": str(i)} for i in range(12)]),
            ("tens", [{"prompt": f"{i} + 10 = ", "completion": str(i + 10)} for i in range(12)]),
        )
    ]
    folder = tmp_path / "run"
    training = {"output_dir": str(folder), "prompts_per_step": 4, "max_steps": 2, "num_threads": 1}
    data = {"mix": mix, "max_prompt_length": 16}
    AcceleratorState._reset_state(reset_partial_state=True)
    threads = torch.get_num_threads()
    try:
        rollout = {"max_completion_length": 8}
        sft.train(make_recipe(tiny_model, stage="sft", rewards=[], data=data, rollout=rollout, training=training))
    finally:
        release_run_folder(folder)
        torch.set_num_threads(threads)
    first, last = (row for row in lines(folder) if "eval/loss" in row)
    for row in (first, last):
        parts = [row["eval/sources/digits/loss"], row["eval/sources/tens/loss"]]
        assert min(parts) <= row["eval/loss"] <= max(parts)
        assert parts[0] != parts[1]
