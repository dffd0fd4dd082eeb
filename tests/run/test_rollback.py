"""Back to the best model: what goes back and what goes on, that it repeats to the bit, and when it can't be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from grpo.errors import RunError
from grpo.health.best import Best
from grpo.model.moments import moments, optimized
from grpo.model.policy import Policy
from grpo.report.judgement import judgement
from grpo.run.read import read_run
from grpo.run.rollback import KEPT, go_back, state_of_best, states_of_best, why_not
from grpo.run.state import Progress, restore_state, save_state, write_state
from tests.conftest import make_policy, make_recipe
from tests.gradient_of_step import sequences
from tests.small_runs import lines, progress, small_run

BACK: dict[str, Any] = {  # an untrained model fills its six tokens, so the rule holds from the fifth step on
    "data": {"eval_size": 4},
    "training": {"save_best": "eval/accuracy", "eval_every": 4, "save_every": 5, "replica_check_every": 0},
    "health": {"cut_off": "rollback", "max_rollbacks": 1},
}


def run_until(
    ending: type[BaseException], model: Path, folder: Path, patch: pytest.MonkeyPatch, **more: Any
) -> pytest.ExceptionInfo[BaseException]:
    training = {"output_dir": str(folder), "prompts_per_step": 4, "max_steps": 12, "num_threads": 1}
    with pytest.raises(ending) as found:
        small_run(model, folder, patch, **BACK | {"training": training | BACK["training"]}, **more)
    return found


@pytest.mark.slow
def test_a_run_goes_back_once_and_stops_the_second_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "grpo"):
        ended = run_until(RunError, tiny_model, whole, monkeypatch)
    assert ended.match(r"stopped by health.cut_off: .*\(step 10\); it has gone back to its best model 1 times already")
    assert "step 5: back to the best model (step 0, eval/accuracy" in caplog.text
    assert "rollback 1 of 1: health.cut_off" in caplog.text

    rows = lines(whole)
    (back,) = [row for row in rows if "rollback/to_step" in row]
    assert back == {"step": 5, "rollback/to_step": 0.0, "rollback/count": 1.0, "rollback/cut_off": 1.0}
    (fifth,) = [row for row in rows if row["step"] == 5 and "reward" in row]
    assert progress(whole, 5)["num_tokens"] == fifth["num_tokens"], "what counts goes on"
    start, after, last = (weights(whole, name) for name in ("best/step_000000", "step_000005", "step_000010"))
    assert same(start, after)
    assert not same(start, last)
    found = read_run(whole)
    assert [row["step"] for row in found.training] == list(range(1, 11)), "its row takes no step's place"
    (told,) = [finding.text for finding in judgement(found) if finding.name == "rollback"]
    assert told.startswith("After step 5 it went back to its best model, of step 0, because of cut_off")


def weights(folder: Path, checkpoint: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/{checkpoint}/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def make_step(policy: Policy) -> None:
    (policy.logprobs(policy.collate(sequences()), 1.0)[0].sum() / 100).backward()
    policy.step(1e-2)
    if policy.reference is not None:
        policy.mix_reference(0.5)


def state_of(policy: Policy) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": tensor for name, tensor in policy.trained_state().items()}
    found |= moments(optimized(policy.model, policy.optimizer), policy.optimizer)
    if policy.reference is not None:
        found |= {f"reference.{name}": p for name, p in policy.reference.causal_lm.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


@pytest.mark.parametrize(
    "sections",
    [
        {"algorithm": {"beta": 0.1, "sync_ref_model": True}},
        {"model": {"lora": {"r": 4}}},
        {"model": {"dtype": "bfloat16", "weights": "bfloat16"}},
    ],
    ids=["a moving reference", "LoRA", "bfloat16 weights"],
)
def test_weights_moments_and_reference_go_back_to_the_bit_and_the_next_step_is_the_one_after_the_best(
    tiny_model: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    policy = make_policy(tiny_model, needs_reference="algorithm" in sections, **sections)
    recipe = make_recipe(tiny_model, **sections)
    learned: dict[str, Any] = {"pass_rates": {3: 0.5}, "entropy_control": (0.1, 0.2), "replay": [{"prompt_id": 3}]}
    best = Progress(1, 10, 1.0, extra_prompts=2, **learned)
    write_state(tmp_path, recipe, policy, Progress(), None, keep=KEPT)
    make_step(policy)
    write_state(tmp_path, recipe, policy, best, None, keep=KEPT)
    at_best = state_of(policy)
    make_step(policy)
    after, changes = state_of(policy), policy.changes

    now = Progress(9, 90, 9.0, extra_prompts=7, pass_rates={3: 0.0, 4: 0.0}, micro_batch_limit=64)
    found = go_back(tmp_path / "step_000001", recipe, policy, now)
    assert policy.changes > changes
    assert same(state_of(policy), at_best)
    assert found == Progress(9, 90, 9.0, extra_prompts=7, micro_batch_limit=64, **learned)
    make_step(policy)
    assert same(state_of(policy), after)

    go_back(tmp_path / "step_000000", recipe, policy, now)  # before the first step there are no moments
    assert not any(name.endswith("exp_avg") for name in state_of(policy))
    make_step(policy)
    assert same(state_of(policy), at_best)


def test_states_of_steps_that_a_resumed_run_makes_again_are_set_aside(tiny_model: Path, tmp_path: Path) -> None:
    """Or the newest two, which are kept, would be those, and a better model's state would go at once."""
    policy, recipe = make_policy(tiny_model), make_recipe(tiny_model, training={"output_dir": str(tmp_path)})
    root = states_of_best(tmp_path)

    def kept_after(step: int) -> list[str]:
        write_state(root, recipe, policy, Progress(step), None, keep=KEPT)
        return sorted(path.name for path in root.iterdir())

    kept_after(40)
    assert kept_after(60) == ["step_000040", "step_000060"]
    save_state(tmp_path, recipe, policy, Progress(50))
    assert restore_state(tmp_path / "checkpoints/step_000050", recipe, policy).step == 50
    assert kept_after(55) == ["step_000040", "step_000055"]
    restore_state(None, recipe, policy)  # no checkpoint verifies: it starts at step 0
    assert kept_after(0) == ["step_000000"]


def test_what_can_t_be_gone_back_to_is_said(tiny_model: Path, tmp_path: Path) -> None:
    best = Best("eval/accuracy")
    assert "no evaluation yet" in (why_not(tmp_path, best, 2) or "")
    best.see({"step": 0, "eval/accuracy": 0.5})
    assert "checkpoints/best/step_000000: manifest.json: No such file" in (why_not(tmp_path, best, 2) or "")
    policy = make_policy(tiny_model)
    write_state(states_of_best(tmp_path), make_recipe(tiny_model), policy, Progress(), None, keep=KEPT)
    assert why_not(tmp_path, best, 2) is None
    best.see({"step": 1, "rollback/to_step": 0})
    assert "gone back to its best model 1 times already (health.max_rollbacks)" in (why_not(tmp_path, best, 1) or "")
    weights_file = state_of_best(tmp_path, best) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    assert "model.safetensors has changed" in (why_not(tmp_path, best, 2) or "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"training": {"save_best": None}},
            "health.gradient: rollback goes back to the best model, so set training.save_best",
        ),
        ({"data": {"eval_size": 0}}, "with data.eval_size: 0 nothing is evaluated"),
        ({"training": {"eval_every": 0}, "evaluation": {"at_start": False}}, "nothing is evaluated before the end"),
    ],
)
def test_a_recipe_without_a_best_model_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "training": {"output_dir": str(tmp_path), "save_best": "eval/accuracy"},
        "health": {"gradient": "rollback"},
        "data": {"eval_size": 4},
    }
    make_recipe(tmp_path, **sections)
    for name, keys in changed.items():
        sections[name] = sections.get(name, {}) | keys
    with pytest.raises(ValidationError, match=said):
        make_recipe(tmp_path, **sections)
