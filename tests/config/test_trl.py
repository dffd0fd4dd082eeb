"""``grpo convert``: every key of TRL's has a place, a reason, or a sum that it goes into; recipes validate.

``trl/keys.json`` holds the fields of TRL's classes with their defaults, as the version in it declares them.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from grpo.config.load import load_recipe
from grpo.config.trl.conversion import Conversion, convert, our_default
from grpo.config.trl.keys import (
    CARRIED,
    CARRIED_GRPO,
    CARRIED_SFT,
    CARRIED_VLLM,
    COMPUTED,
    COMPUTED_GRPO,
    COMPUTED_SFT,
    DEFAULTS_WITHOUT_PLACE,
    NO_PLACE,
    known_keys,
)
from grpo.config.trl.write import read_trl, write_recipe
from grpo.errors import UserError

FILES = Path(__file__).parent / "trl"
PINNED: dict[str, dict[str, Any]] = json.loads((FILES / "keys.json").read_text())
SCRIPT = {**PINNED["ModelConfig"], **PINNED["ScriptArguments"]}
GRPO = {**PINNED["TrainingArguments"], **PINNED["GRPOConfig"], **SCRIPT}
SFT = {**PINNED["TrainingArguments"], **PINNED["SFTConfig"], **SCRIPT}
LEAST = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["mine.judge"], "output_dir": "runs/x"}


def loaded(found: Conversion, tmp_path: Path) -> Any:
    """What ``load_recipe`` makes of what is printed."""
    file = tmp_path / "recipe.yaml"
    file.write_text(write_recipe(found, "trl.yaml"), encoding="utf-8")
    return load_recipe(file)


def words(found: Conversion) -> set[str]:
    text = write_recipe(found, "trl.yaml")
    header = " ".join(line.removeprefix("#") for line in text.splitlines() if line.startswith("#"))
    return set(re.findall(r"\w+", header))


def test_every_key_of_trl_is_sorted_and_none_twice() -> None:
    assert {*GRPO, *SFT} - known_keys() == set()
    tables = (CARRIED | CARRIED_GRPO | CARRIED_SFT, CARRIED_VLLM, COMPUTED | COMPUTED_GRPO | COMPUTED_SFT, NO_PLACE)
    for one, other in itertools.combinations(tables, 2):
        assert one.keys() & other.keys() == set()


def test_defaults_are_those_of_the_version_that_is_pinned() -> None:
    ours = {key: carried.default for key, carried in {**CARRIED, **CARRIED_GRPO}.items()}
    ours |= {key: carried.default for key, (_, carried) in CARRIED_VLLM.items()} | COMPUTED | COMPUTED_GRPO
    filled_in = {"output_dir": None}  # by TrainingArguments.__post_init__, with trainer_output
    for key, default in (ours | DEFAULTS_WITHOUT_PLACE).items():
        if key in GRPO and key != "hub_token":
            pinned = filled_in.get(key, GRPO[key])
            assert (default if key != "output_dir" else None) == pinned, key
    assert CARRIED_SFT["learning_rate"].default == SFT["learning_rate"]
    assert COMPUTED_SFT["max_length"] == SFT["max_length"]


def test_every_place_is_a_key_of_the_recipe() -> None:
    tables = {**CARRIED, **CARRIED_GRPO, **CARRIED_SFT}
    for carried in [*tables.values(), *(carried for _, carried in CARRIED_VLLM.values())]:
        our_default(carried.place)  # raises KeyError


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_file_becomes_a_recipe_that_validates_and_none_of_its_keys_is_dropped_silently(
    file: Path, tmp_path: Path
) -> None:
    given = read_trl(file)
    found = convert(given, num_processes=8, rows=1000)
    assert loaded(found, tmp_path).training.output_dir
    assert given.keys() - words(found) == set()


def test_a_whole_grpo_config_as_json_becomes_a_recipe_and_names_every_key(tmp_path: Path) -> None:
    file = tmp_path / "grpo.json"
    file.write_text(json.dumps({key: value for key, value in GRPO.items() if key not in SCRIPT}))
    found = convert(read_trl(file))
    recipe = loaded(found, tmp_path)
    assert [place for place, _ in found.to_fill] == ["model.name", "data.hub", "rewards", "training.max_steps"]
    assert recipe.training.seed == 42
    assert recipe.optimizer.lr_scheduler_type == "linear"
    given = {key for key, value in GRPO.items() if key not in SCRIPT and value is not None}
    assert given - words(found) == set()


def test_a_whole_sft_config_as_json_becomes_a_supervised_recipe(tmp_path: Path) -> None:
    given = {key: value for key, value in SFT.items() if key not in SCRIPT}
    found = convert(given)
    recipe = loaded(found, tmp_path)
    assert (recipe.stage, recipe.optimizer.learning_rate, recipe.training.prompts_per_step) == ("sft", 2e-5, 8)
    assert {key for key, value in given.items() if value is not None} - words(found) == set()


# A value of each type that is not the default of any key.
OTHER = {
    bool: lambda d: not d,
    int: lambda d: d + 3,
    float: lambda d: d / 2 + 0.3,
    str: lambda d: "other",
    list: lambda d: [],
}
VALUES: dict[str, Any] = {
    "loss_type": "sapo",
    "max_tool_calling_iterations": 3,
    "importance_sampling_level": "sequence",
    "multi_objective_aggregation": "normalize_then_sum",
    "vllm_importance_sampling_mode": "token_mask",
    "scale_rewards": "batch",
    "vllm_mode": "server",
    "entropy_coef_max": 2.0,
    "router_aux_loss_coef": 0.01,
    "max_steps": 12,
    "reward_weights": [0.5],
    "min_p": 0.1,
    "epsilon_high": 0.3,
    "delta": 2.0,
    "off_policy_mask_threshold": 0.5,
    "num_generations_eval": 4,
    "vllm_max_model_length": 2048,
    "generation_batch_size": 64,
    "steps_per_generation": 4,
    "save_total_limit": 3,
    "max_length": 333,
    "chat_template_kwargs": {"enable_thinking": False},
    "generation_kwargs": {"top_k": 5},
    "model_init_kwargs": {"dtype": "bfloat16"},
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "vllm_importance_sampling_cap": 2.0,
    "vllm_importance_sampling_clip_min": 0.5,
    "eval_steps": 10,
    "bf16": False,
    "lora_target_modules": ["q_proj"],
    "datasets": [{"path": "d", "split": "train"}],
    "reward_funcs": ["accuracy_reward"],
    "top_p": 0.9,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grpo", "sft"])
@pytest.mark.parametrize("switches", [{}, {"use_vllm": True, "use_peft": True, "beta": 0.1, "eval_strategy": "steps"}])
def test_each_key_alone_validates_and_is_named(stage: Any, switches: dict[str, Any], tmp_path: Path) -> None:
    for key, default in (GRPO if stage == "grpo" else SFT).items():
        other = VALUES.get(key, OTHER[type(default)](default) if default is not None else "other")
        if stage == "sft" and key == "loss_type":
            other = "dft"
        given = {**LEAST, **switches, key: other}
        found = convert(given, stage=stage)
        assert key in words(found), key


def test_what_trl_counts_in_optimizer_steps_is_counted_in_rollouts() -> None:
    given = {**LEAST, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 8}
    given |= {"num_generations": 8, "num_iterations": 2, "max_steps": 80, "save_steps": 16, "warmup_steps": 9}
    found = convert(given, num_processes=2).recipe
    assert found["training"]["prompts_per_step"] == 4 * 2 * 8 / 8
    assert found["algorithm"]["num_minibatches"] == 4
    assert found["training"]["max_steps"] == 80 / (4 * 2)
    assert found["training"]["save_every"] == 2
    assert found["optimizer"]["warmup_steps"] == 2  # 9 of them end within the second of ours


def test_accumulation_over_several_rollouts_is_one_step() -> None:
    given = {**LEAST, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2}
    found = convert(given).recipe
    assert found["training"]["prompts_per_step"] == 4  # both rollouts of an optimizer step are of the same policy
    assert "num_minibatches" not in found["algorithm"]


def test_a_saved_configuration_says_how_many_processes_it_had() -> None:
    saved = {**LEAST, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    found = convert({**saved, "generation_batch_size": 64}).recipe
    assert found["training"]["prompts_per_step"] == 8
    assert "num_minibatches" not in found["algorithm"]


def test_weights_belong_to_their_functions() -> None:
    found = convert({**LEAST, "reward_funcs": ["a.one", "b.two"], "reward_weights": [1, "0.5"]}).recipe
    assert found["rewards"] == [{"path": "a:one"}, {"path": "b:two", "weight": 0.5}]
    assert convert({**LEAST, "reward_weights": 0.5}).recipe["rewards"] == [{"path": "mine:judge", "weight": 0.5}]


def test_an_epoch_is_rows_over_prompts() -> None:
    found = convert({**LEAST, "per_device_train_batch_size": 16, "num_train_epochs": 2}, rows=101).recipe
    assert found["training"]["max_steps"] == 2 * (101 // 2)


def test_text_of_other_yaml_readers_is_read_as_trl_reads_it() -> None:
    given = {**LEAST, "learning_rate": "5e-6", "bf16": "False", "scale_rewards": "false", "eval_strategy": "no"}
    found = convert(given).recipe
    assert found["optimizer"]["learning_rate"] == 5e-6
    assert found["model"]["dtype"] == "float32"
    assert found["algorithm"]["scale_rewards"] == "none"
    assert found["data"]["eval_size"] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "hot"}, "temperature: .*number"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: expected an integer, got 2.5"),
        ({"use_vllm": "perhaps"}, "use_vllm: expected true or false, got 'perhaps'"),
        ({"epsilon": -1}, "epsilon: .*above 0"),
        ({"reward_weights": ["much"]}, "reward_weights: expected numbers"),
        ({"num_generations": 1}, "num_generations: .*at least 2"),
    ],
)
def test_a_value_that_its_key_does_not_take_is_named_by_trls_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert({**LEAST, **given})


def test_an_unknown_key_is_named_with_the_nearest() -> None:
    found = convert({**LEAST, "num_generation": 4, "kl_coef": 0.1})
    left = dict(found.left)
    assert "did you mean num_generations?" in left["num_generation"]
    assert "algorithm.beta" in left["kl_coef"]


def test_a_value_cannot_end_a_comment() -> None:
    found = convert({**LEAST, "report_to": ["x\nmodel: {name: evil}"], "kéy\u2028stage: sft": 1})
    text = write_recipe(found, "trl.yaml")
    assert all(line.startswith("#") for line in text.partition("\nstage:")[0].split("\n"))
    assert "\u2028" not in text


def test_tools_and_environments_become_the_section_environment(tmp_path: Path) -> None:
    place = tmp_path / "env.py"
    place.write_text("class Env:\n    def reset(self): ...\n    def get_reward(self): return 1.0\nclass Other: ...\n")
    agent = {**LEAST, "tools": ["my_tools.py:search"], "environment_factory": f"{place}:Env"}
    found = convert(agent | {"max_tool_calling_iterations": 3})
    recipe = loaded(found, tmp_path)
    assert (recipe.environment.path, recipe.environment.tools) == (f"{place}:Env", ["my_tools.py:search"])
    assert recipe.environment.max_turns == 4
    assert [reward.name for reward in recipe.rewards] == [None, "environment"]
    assert {"max_tool_calling_iterations", "environment_factory", "tools"} <= words(found)
    other = convert(agent | {"environment_factory": f"{place}:Other"})
    assert [reward.get("name") for reward in other.recipe["rewards"]] == [None]
    assert other.recipe["environment"]["max_turns"] == 8
    alone = convert({**LEAST, "reward_funcs": None, "environment_factory": f"{place}:Other"})
    assert alone.recipe["rewards"] == [{"name": "environment"}]


def test_what_trl_takes_in_code_is_to_be_filled_in(tmp_path: Path) -> None:
    found = convert({**LEAST, "max_tool_calling_iterations": 3})
    assert dict(found.to_fill)["environment.path"].startswith("what TRL's script gives as environment_factory")
    assert loaded(found, tmp_path).environment.max_turns == 4
    named = convert({**LEAST, "tools": ["search"], "environment_factory": "Env"})
    to_fill = dict(named.to_fill)
    assert to_fill["environment.path"] == "the place of Env: file.py:Env"
    assert to_fill["environment.tools"] == "the place of search: file.py:function"
    several = convert({**LEAST, "environment_factory": {"a": "x.py:A"}})
    assert dict(several.left)["environment_factory"].startswith("a recipe has one environment")
    assert "environment" not in several.recipe
    assert "environment" not in convert(LEAST).recipe
