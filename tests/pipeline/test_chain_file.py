"""A chain's file: every mistake of every stage at once, and recipes that take their inputs from other stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.errors import UserError
from grpo.pipeline.chain_file import CHAINS, as_overrides, find_chain, load_chain

SFT = """\
stage: sft
model: {name: some/model, lora: {r: 4}}
data: {name: traces}
training: {output_dir: run}
"""
RL = """\
model: {name: some/model, lora: {r: 4}}
data: {name: countdown, eval_size: 8}
rewards: [{name: countdown}, {name: format, weight: 0.0}]
training: {output_dir: run, seed: 5}
"""
CHAIN = """\
output_dir: out
seed: 3
evaluate: {recipe: rl.yaml, seeds: [0, 1], form: format}
stages:
  cold: {kind: sft, recipe: sft.yaml}
  rl: {kind: grpo, recipe: rl.yaml, from: cold, overrides: {rollout.temperature: 0.9, optimizer: {learning_rate: 1e-5}}}
  sampled: {kind: sample, recipe: rl.yaml, from: rl, keep: "correct,shortest=2", n: 4}
  again: {kind: sft, recipe: sft.yaml, from: cold, rows: sampled}
  tested: {kind: eval, recipe: rl.yaml, from: again}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text(SFT)
    Path("rl.yaml").write_text(RL)


def refused(text: str, *overrides: str) -> list[str]:
    Path("chain.yaml").write_text(text)
    with pytest.raises(UserError) as told:
        load_chain("chain.yaml", overrides)
    return str(told.value).splitlines()


def test_recipes_take_their_inputs_from_stages() -> None:
    Path("chain.yaml").write_text(CHAIN)
    plan = load_chain("chain.yaml")
    cold, rl, sampled, again, tested = (stage.recipe for stage in plan.stages)
    assert (cold.model.name, rl.model.name, again.model.name) == ("some/model", *["out/cold/run/final"] * 2)
    assert rl.model.lora is not None  # trained anew over what it begins with
    assert sampled.model.name == "out/rl/run/final"
    assert sampled.model.lora is tested.model.lora is None  # sampled from as it is
    assert (again.data.name, again.data.path) == (None, "out/sampled/rows.jsonl")
    assert tested.model.name == "out/again/run/final"
    assert {stage.recipe.training.seed for stage in plan.stages} == {3}
    assert rl.training.output_dir == "out/rl/run"
    assert (rl.rollout.temperature, rl.optimizer.learning_rate) == (0.9, 1e-5)
    assert plan.measure is not None
    assert plan.measure.seeds == (0, 1)


def test_a_chain_can_be_overridden() -> None:
    Path("chain.yaml").write_text(CHAIN)
    plan = load_chain(
        "chain.yaml", ["output_dir=other", "stages.rl.overrides.training.max_steps=7", "stages.sampled.n=2"]
    )
    assert plan.stages[1].recipe.training.max_steps == 7
    assert plan.stages[1].recipe.model.name == "other/cold/run/final"
    assert plan.stages[2].config.n == 2


def test_overrides_are_those_of_the_command_line() -> None:
    given = {"training": {"max_steps": 3}, "data.args": {"a": 1}, "data": {"args": {"b": [1.5, None]}}, "stage": "sft"}
    expected = ["training.max_steps=3", 'data.args={"a": 1}', 'data.args={"b": [1.5, null]}', 'stage="sft"']
    assert as_overrides(given) == expected


def test_all_mistakes_of_all_stages_are_told_at_once() -> None:
    found = refused(
        """\
output_dir: out
evaluate: {recipe: rl.yaml, form: readable, overrides: {data.eval_size: 0}}
stages:
  start: {kind: sft, recipe: sft.yaml}
  a/b: {kind: sft, recipe: rl.yaml}
  rl: {kind: grpo, recipe: sft.yaml, from: sampled}
  rl2: {kind: grpo, recipe: rl.yaml, overrides: {training.max_step: 3, rollout.temperature: -1}}
  sampled: {kind: sample, recipe: rl.yaml, from: a/b, rows: rl, keep: [corect, shortest=0]}
  judged: {kind: sample, recipe: sft.yaml}
  taught: {kind: distill, recipe: rl.yaml}
  lost: {kind: grpo, recipe: nowhere.yaml}
  mine: {kind: grpo, recipe: rl.yaml, overrides: {rewards: [{path: "mine.py:fn"}], data: {path: x.jsonl, name: null}}}
  eval0: {kind: eval, recipe: rl.yaml, from: rl, overrides: {data.eval_size: 0}}
  kept: {kind: filter, recipe: rl.yaml, pass_rate: half}
"""
    )
    expected = [
        "stage start: a name is of letters, digits, _ and -, and not start",
        "stage a/b: a name is of letters",
        "stage a/b: kind: sft needs a recipe with stage: sft; rl.yaml has grpo",
        "stage rl: from: sampled is no stage before this one that makes a model (there are start, a/b)",
        "stage rl: kind: grpo needs a recipe with stage: grpo; sft.yaml has sft",
        "stage rl2: override training.max_step=3: unknown key",
        "stage rl2: override rollout.temperature=-1: must be above 0",
        "stage sampled: rows: rl is no stage before this one that makes rows (there is none)",
        "stage sampled: keep: corect: no such rule",
        "stage sampled: keep: shortest=0: needs a number above 0",
        "stage judged: kind: sample judges by the recipe's rewards, and sft.yaml has none",
        "stage taught: kind: distill needs teacher: STAGE, or a recipe with a teacher section",
        "stage lost: nowhere.yaml: no such file",
        "stage mine: data.path: there is no file x.jsonl",
        "stage mine: rewards.0.path: there is no file",
        "stage eval0: data.eval_size is 0: there is nothing to evaluate on",
        "stage kept: pass_rate: write LOW..HIGH",
        "evaluate: data.eval_size is 0: there is nothing to evaluate on",
        "evaluate: form: the recipe has no reward 'readable' (there are countdown, format)",
    ]
    for line in expected:
        assert any(one.startswith(line) for one in found), f"{line}\nis not in\n" + "\n".join(found)
    assert len(found) == len(expected), found


def test_mistakes_of_the_file_have_their_lines() -> None:
    found = refused(
        """\
output_dir: out
stage: {}
evaluate: {recipe: rl.yaml, seeds: [0, 0]}
stages:
  cold: {kind: sftt, recipe: sft.yaml}
  rl: {kind: grpo, recipe: rl.yaml, n: 4, fron: cold}
  eval: {kind: eval, recipe: rl.yaml}
  none: {kind: sft}
""",
        "stages.rl.prompts=many",
    )
    expected = [
        "chain.yaml:2: stage: unknown key, did you mean stages?",
        "chain.yaml:3: evaluate.seeds: a seed is named twice",
        "chain.yaml:5: stages.cold.kind: must be sft, grpo, distill, sample, filter or eval, got 'sftt'; did you "
        "mean sft?",
        "chain.yaml:6: stages.rl.fron: unknown key, did you mean from?",
        "chain.yaml:8: stages.none.recipe: missing",
        "override stages.rl.prompts=many: expected an integer, got 'many'",
    ]
    assert [line for line in found if "kind: eval" not in line] == expected
    assert refused(
        "output_dir: out\nstages:\n  rl: {kind: grpo, recipe: rl.yaml, n: 4}\n  e: {kind: eval, recipe: rl.yaml}\n"
    ) == [
        "chain.yaml:3: stages.rl: n is not used with kind: grpo",
        "chain.yaml:4: stages.e: kind: eval needs from",
    ]
    empty = "chain.yaml: the file is empty; a chain has sections such as output_dir:, evaluate: and stages:"
    assert refused("") == [empty]


def test_form_that_a_stage_is_paid_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    Path("chain.yaml").write_text(CHAIN.replace("rollout.temperature: 0.9", "rewards.1.weight: 0.1"))
    load_chain("chain.yaml")
    assert "evaluate.form: format is a reward with a weight in rl" in caplog.text


def test_shipped_chains_are_found_by_name_and_are_sound() -> None:
    for file in CHAINS.glob("*.yaml"):
        assert find_chain(file.stem) == file
        load_chain(file.stem)
    with pytest.raises(UserError, match="smoke_cup: no such file or chain, did you mean smoke_cpu"):
        find_chain("smoke_cup")


def test_a_recipe_beside_the_chain_comes_first(tmp_path: Path) -> None:
    folder = tmp_path / "chains"
    folder.mkdir()
    (folder / "rl.yaml").write_text(RL.replace("seed: 5", "seed: 6"))
    (folder / "chain.yaml").write_text("output_dir: out\nstages:\n  rl: {kind: grpo, recipe: rl.yaml}\n")
    assert load_chain("chains/chain.yaml").stages[0].recipe.training.seed == 6


def test_any_stage_option_that_is_given_counts() -> None:
    """Also one whose value is as good as none."""
    options: dict[str, Any] = {"keep": "correct", "n": 1}
    text = "output_dir: out\nstages:\n  s: {kind: sample, recipe: rl.yaml, " + ", ".join(
        f"{k}: {v}" for k, v in options.items()
    )
    Path("chain.yaml").write_text(text + "}\n")
    assert load_chain("chain.yaml").stages[0].config.given() == {"keep", "n"}
