"""Recipes from YAML: what people mean by a number, overrides, and every mistake in words with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from grpo.config import Recipe
from grpo.config.hints import NOT_HERE, PREFIXES, RENAMED, foreign, sections
from grpo.config.load import dump_recipe, load_recipe
from grpo.config.yaml_text import dump, parse
from grpo.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))

GOOD = """\
model: {name: some/model}
data: {name: countdown}
rewards:
  - {name: countdown}
  - {name: format, weight: 0.1}
rollout:
  num_generations: 4
training:
  output_dir: runs/test
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes ``recipe.yaml`` and makes its folder the current one, so that messages read as a person sees them."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> str:
        Path("recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return "recipe.yaml"

    return write


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


def only_problem(path: str, *overrides: str) -> str:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    return found[0]


# --- what loads ---


def test_defaults_and_values(write):
    recipe = load_recipe(write(GOOD))
    assert recipe.rollout.num_generations == 4
    assert recipe.rollout.temperature == 1.0
    assert recipe.training.output_dir == "runs/test"
    assert recipe.reward_names() == ["countdown", "format"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("1E5", 1e5), ("5e-7", 5e-7), ("1.e3", 1e3), (".5", 0.5), ("-1e+2", -100.0),
        ("1_0.5", 10.5), ("1_000", 1000), ("0", 0), ("-3", -3), ("0x10", 16), ("true", True), ("False", False),
        ("null", None), ("", None), ("off", "off"), ("yes", "yes"), ("NO", "NO"), ("2024-01-31", "2024-01-31"),
        ("1:30", "1:30"), ("010", "010"), ("e5", "e5"), ("1e", "1e"), (".", "."), ("'1e-6'", "1e-6"), ("=", "="),
        ("-", [None]), ("r1.5", "r1.5"),
    ],
)  # fmt: skip
def test_scalars_mean_what_people_mean(text, value):
    found = parse(text).value
    assert found == value
    assert type(found) is type(value)


def test_numbers_without_a_dot_reach_the_recipe(write):
    text = GOOD + "optimizer: {learning_rate: 1e-6, adam_epsilon: 1E-8}\n"
    assert load_recipe(write(text)).optimizer.learning_rate == 1e-6


def test_wandb_off_is_text(write):
    assert load_recipe(write(GOOD + "tracking: {wandb: off}")).tracking.wandb == "off"


def test_empty_section_is_its_defaults(write):
    assert load_recipe(write(GOOD + "algorithm:\n  # beta: 0.04\n")).algorithm.beta == 0.0


def test_anchors_and_merge_keys(write):
    text = GOOD + "optimizer: &slow {learning_rate: 1e-5}\n"
    text += "evaluation: {num_generations: 2, temperature: 0.6}\nscoring: {workers: 1}\n"
    merged = text.replace("{name: format, weight: 0.1}", "{<<: {weight: 0.5, timeout: 3}, name: format, weight: 0.1}")
    recipe = load_recipe(write(merged))
    assert recipe.rewards[1].weight == 0.1
    assert recipe.rewards[1].timeout == 3


def test_byte_order_mark(write):
    assert load_recipe(write(b"\xef\xbb\xbf" + GOOD.encode())).model.name == "some/model"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_parse_and_round_trip(file, tmp_path):
    recipe = load_recipe(file)
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "dumped.yaml") == recipe


def test_there_are_recipes():
    assert RECIPES


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN)
def test_dump_reads_back_equal(value):
    document = parse(dump(value))
    assert document.value == value
    assert not document.problems


@given(
    st.from_regex(r"[-+]?[0-9_.]{0,4}[eE]?[-+]?[0-9]{0,3}", fullmatch=True) | st.sampled_from(["off", "~", "<<", "1:2"])
)
@settings(max_examples=200, deadline=None)
def test_text_like_a_number_is_dumped_as_text_for_any_reader(text):
    assert parse(dump({"key": text})).value == {"key": text}
    assert yaml.safe_load(dump({"key": text})) == {"key": text}


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text(min_size=1, max_size=20),
    stop=st.lists(st.text(min_size=1, max_size=5), max_size=3),
    rate=st.floats(1e-12, 1),
)
def test_recipe_round_trip(tmp_path, name, stop, rate):
    raw: dict[str, Any] = yaml.safe_load(GOOD)
    raw |= {"tracking": {"run_name": name}, "optimizer": {"learning_rate": rate}}
    raw["rollout"]["stop"] = stop
    raw["model"]["lora"] = {"target_modules": ["q_proj", name]}
    recipe = Recipe.model_validate(raw)
    file = tmp_path / "dumped.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(file) == recipe


# --- overrides ---


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("rollout.temperature=0.8", lambda r: r.rollout.temperature, 0.8),
        ("optimizer.learning_rate=5e-7", lambda r: r.optimizer.learning_rate, 5e-7),
        ("rewards.0.weight=0.5", lambda r: r.rewards[0].weight, 0.5),
        ("model.lora.r=64", lambda r: r.model.lora.r, 64),
        ("rewards.2.path=mine.py:fn", lambda r: r.reward_names(), ["countdown", "format", "fn"]),
        ("rewards.2={name: format}", lambda r: r.reward_names(), ["countdown", "format", "format#2"]),
        ("rewards=[{name: countdown}]", lambda r: r.reward_names(), ["countdown"]),
        ("rollout.stop=['</answer>', a=b]", lambda r: r.rollout.stop, ["</answer>", "a=b"]),
        ("training.output_dir=runs/a=b c", lambda r: r.training.output_dir, "runs/a=b c"),
        ("training.output_dir=#1", lambda r: r.training.output_dir, "#1"),
        ("tracking.run_name=", lambda r: r.tracking.run_name, None),
        ("data.args.numbers.low=3", lambda r: r.data.args, {"numbers": {"low": 3}}),
    ],
)
def test_override(write, override, get, value):
    assert get(load_recipe(write(GOOD), [override])) == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollout.temperature", "0.8"], "rollout.temperature 0.8: write rollout.temperature=0.8"),
        (["--rollout.temperature=0.8"], "--rollout.temperature=0.8: write rollout.temperature=0.8"),
        (["--rollout.temperature", "0.8"], "--rollout.temperature 0.8: write rollout.temperature=0.8"),
        (["rollout.temperature", "=", "0.8"], "rollout.temperature = 0.8: write rollout.temperature=0.8"),
        (["rollout.temperature=", "0.8"], "rollout.temperature= 0.8: write rollout.temperature=0.8"),
        (["rewards.0.weight", "2"], "rewards.0.weight 2: write rewards.0.weight=2"),
        (["rollout.top_p=1", "rollout.top_k"], "rollout.top_k: write rollout.top_k=VALUE"),
    ],
)
def test_a_key_in_another_form_is_told_what_to_write(write, words, said):
    assert problems(write(GOOD), *words) == [said]


def test_paths_may_begin_at_home(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    made = load_recipe(
        write(GOOD),
        [
            *("model.name=~/m", "model.tokenizer=~/t", "training.output_dir=~/runs/x", "rewards=[{path: '~/r.py:fn'}]"),
            *("data={path: ~/rows.csv, eval_path: ~/e.jsonl}", "rollout.backend=~/b.py:B"),
            "algorithm.loss_type=~/l.py:l",
        ],
    )
    assert (made.model.name, made.model.tokenizer) == ("/home/me/m", "/home/me/t")
    assert made.training.output_dir == "/home/me/runs/x"
    assert made.rewards[0].path == "/home/me/r.py:fn"
    assert (made.data.path, made.data.eval_path) == ("/home/me/rows.csv", "/home/me/e.jsonl")
    assert made.rollout.backend == "/home/me/b.py:B"
    assert made.algorithm.loss_type == "/home/me/l.py:l"
    assert load_recipe(write(GOOD), ["data={name: ~/task.py:build}"]).data.name == "/home/me/task.py:build"


def test_later_overrides_win_and_mend_the_file(write):
    text = GOOD.replace("num_generations: 4", "num_generations: 1")
    overrides = ["rollout.num_generations=2", "rollout.num_generations=16"]
    assert load_recipe(write(text), overrides).rollout.num_generations == 16


def test_a_list_from_nothing(write):
    text = GOOD.replace("rewards:\n  - {name: countdown}\n  - {name: format, weight: 0.1}\n", "")
    assert load_recipe(write(text), ["rewards.0.name=format"]).reward_names() == ["format"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_generations=1", "must be at least 2, got 1. Completions per prompt, G. At least 2: an advantage "
         "compares a completion with its group."),
        ("rollout.num_generation=8", "unknown key, did you mean num_generations?"),
        ("temperature=0.8", "unknown key, temperature belongs under rollout or evaluation"),
        ("rollout.n=8", "unknown key: `n` is `rollout.num_generations` here"),
        ("actor_rollout_ref.rollout.n=8", "unknown key: `n` is `rollout.num_generations` here"),
        ("nothing", "an override is KEY=VALUE, such as rollout.temperature=0.8"),
        ("rewards.\u0660.weight=1", "rewards has 2 items, 0 to 1; \u0660 is not one of them (2 adds one)"),
        ('training.output_dir="a\\0b"', "training.output_dir: holds a NUL character, which no path has"),
        ("=5", "an override is KEY=VALUE, such as rollout.temperature=0.8"),
        ("rollout..top_p=1", "an override is KEY=VALUE, such as rollout.temperature=0.8"),
        ("rewards.7.weight=1", "rewards has 2 items, 0 to 1; 7 is not one of them (2 adds one)"),
        ("rewards.first.weight=1", "rewards has 2 items, 0 to 1; first is not one of them (2 adds one)"),
        ("model.name.size=1", "model.name is 'some/model', it has nothing inside to set"),
        ("rollout={top_p: 1, top_p: 2}", "top_p: duplicate key, first given on line 1"),
        ("rollout.stop=[", "not valid YAML: expected the node content, but found '<stream end>'"),
        ("training={max_steps: 1}", "training.output_dir: missing. Run folder: metrics, rollouts, checkpoints, "
         "the final model, the report."),
        ("rollout.temperature=.nan", "must be a finite number, got nan"),
        ("model.kernels=liger", "model.kernels: must be auto, none or a list of liger and float32_head, got 'liger' "
         "(write [liger])"),
        ("model.kernels=[ligr]", "model.kernels: must be auto, none or a list of liger and float32_head, got "
         "['ligr']"),
    ],
)  # fmt: skip
def test_bad_override(write, override, message):
    assert only_problem(write(GOOD), override) == f"override {override}: {message}"


# --- mistakes in the file ---


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("optimizer: {learning_rat: 1e-6}", "optimizer.learning_rat: unknown key, did you mean learning_rate?"),
        ("temperature: 1.0", "temperature: unknown key, temperature belongs under rollout or evaluation"),
        ("algorithm: {output_dir: x}", "algorithm.output_dir: unknown key, output_dir belongs under training"),
        ("rolout: {}", "rolout: unknown key, did you mean rollout?"),
        ("optimizer: {temprature: 1}", "optimizer.temprature: unknown key, did you mean temperature, under rollout?"),
        ("optimizer: {stage: sft}", "optimizer.stage: unknown key, stage belongs at the top level"),
        ("max_prompt_length: 5",
         "max_prompt_length: unknown key: `max_prompt_length` is `data.max_prompt_length` here"),
        ("algorithm: {beta: high}", "algorithm.beta: expected a number, got 'high'"),
        ("algorithm: {beta: '1e-3'}", "algorithm.beta: expected a number, got '1e-3' (without the quotes)"),
        ("algorithm: {beta: true}", "algorithm.beta: expected a number, got true"),
        ("scoring: {workers: 2.5}", "scoring.workers: expected an integer, got 2.5"),
        ("scoring: {workers: 1e1}", "scoring.workers: expected an integer, got 10.0 (write 10)"),
        ("scoring: {workers: true}", "scoring.workers: expected an integer, got true"),
        ("scoring: {workers: 4 processes}", "scoring.workers: expected an integer, got '4 processes'"),
        ("scoring: 2", "scoring: expected a section (key: value), got 2"),
        ("scoring: [2]", "scoring: expected a section (key: value), got a list"),
        ("tracking: {run_name: 7}", "tracking.run_name: expected text, got 7 (put it in quotes)"),
        ("tracking: {tensorboard: yes}", "tracking.tensorboard: expected true or false, got 'yes' (write true)"),
        ("tracking: {tensorboard: 1}", "tracking.tensorboard: expected true or false, got 1"),
        ("tracking: {wandb: true}", "tracking.wandb: must be off, offline or online, got true"),
        ("algorithm: {loss_type: dr_gpro}", "algorithm.loss_type: must be grpo, dr_grpo, dapo, bnpo, gspo, luspo, "
         "cispo, sapo, vespo, reinforce, rloo, reinforce_pp, clip_cov, kl_cov or a loss of yours as file.py:name, got "
         "'dr_gpro'; did you mean dr_grpo?"),
        ("algorithm: {loss_type: rloo, baseline: group}", "algorithm: baseline is leave_one_out with loss_type rloo, "
         "got group: leave it out, or take another loss_type"),
        ("algorithm: {loss_type: gspo, importance_sampling_level: token}", "algorithm: importance_sampling_level: gspo "
         "is of the sequence's ratio; leave it out"),
        ("algorithm: {loss_type: cispo, epsilon_high: 0.28}", "algorithm: epsilon_high (0.28) bounds the weight "
         "itself with loss_type cispo: set it above 1 (5.0 in ScaleRL), or leave it out"),
        ("algorithm: {use_adaptive_entropy: true, entropy_coef: 2.0}", "algorithm: entropy_coef (2.0) must be between "
         "entropy_coef_min (0.0) and entropy_coef_max (1.0)"),
        ("optimizer: {adam_beta1: 1.0}", "optimizer.adam_beta1: must be below 1, got 1.0. AdamW's first-moment decay."),
        ("optimizer: {learning_rate: 0}",
         "optimizer.learning_rate: must be above 0, got 0. Peak learning rate of AdamW."),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate: must be a finite number, got inf"),
        ("algorithm: {delta: 1.0}", "algorithm: delta (1.0) must be above 1 + epsilon (1.2)"),
        ("evaluation: {temperature: 0, num_generations: 4}", "evaluation: temperature 0 is greedy: its 4 completions "
         "would all be the same; set num_generations to 1 or the temperature above 0"),
        ("evaluation: {reward: solved}", "evaluation.reward: solved is not one of rewards (countdown, format)"),
        ("algorithm: {num_minibatches: 5}",
         "training.prompts_per_step (32) is not divisible by algorithm.num_minibatches (5)"),
        ("tracking: {1: x}", "tracking: keys are text, got '1'; quote it"),
        ("tracking: {run_name: !!python/name:os.system x}",
         "tracking.run_name: the tag !!python/name:os.system is not used in recipes"),
        ("tracking: !!set {wandb}", "tracking: the tag !!set is not used in recipes"),
        ("tracking: {run_name: !!int x}", "tracking.run_name: cannot be read as !!int: 'x'"),
        ("tracking: {run_name: !!bool maybe}", "tracking.run_name: cannot be read as !!bool: 'maybe'"),
        ("tracking: {run_name: !!timestamp x}", "tracking.run_name: the tag !!timestamp is not used in recipes"),
        ("tracking: {run_name: " + "9" * 5000 + "}", f"tracking.run_name: cannot be read as !!int: {'9' * 40!r}"),
        ("tracking: {a: &a [" + "x, " * 99 + "x], b: &b [" + "*a, " * 99 + "*a], c: [" + "*b, " * 99 + "*b]}",
         "more than 100,000 values; aliases (*name) repeat all that they stand for"),
        ("tracking: {a: &a {" + ", ".join(f"a{i}: 1" for i in range(99)) + "}, b: &b {<<: [" + "*a, " * 99
         + "*a]}, c: {<<: [" + "*b, " * 99 + "*b]}}",
         "more than 100,000 values; aliases (*name) repeat all that they stand for"),
        ("tracking: &loop {project: x, run_name: *loop}", "tracking.run_name: an alias that contains itself"),
    ],
)  # fmt: skip
def test_mistake_is_named_with_its_line(write, added, message):
    found = only_problem(write(GOOD + "\n" + added + "\n"))
    assert found in (f"recipe.yaml:11: {message}", f"recipe.yaml:11: not valid YAML: {message}")


def test_lists_point_at_their_item(write):
    text = GOOD.replace("{name: format, weight: 0.1}", "{name: format, weigth: 0.1}")
    assert only_problem(write(text)) == "recipe.yaml:5: rewards.1.weigth: unknown key, did you mean weight?"


def test_union_is_one_line(write):
    found = only_problem(write(GOOD), "model.lora.target_modules=3")
    assert found == "override model.lora.target_modules=3: expected text or a list, got 3 (put it in quotes)"


def test_duplicate_keys_name_both_lines(write):
    text = GOOD.replace("num_generations: 4", "num_generations: 4\n  temperature: 1\n  num_generations: 8")
    expected = "recipe.yaml:9: rollout.num_generations: duplicate key, first given on line 7"
    assert only_problem(write(text)) == expected


def test_missing_keys_say_what_they_are(write):
    assert problems(write("model: {}\ntraining:\n  max_steps: 3\n")) == [
        "recipe.yaml: data: missing. Its tasks: where the rows come from and how a row becomes a prompt.",
        "recipe.yaml: rewards: a grpo recipe needs at least one reward, or a teacher",
        "recipe.yaml:1: model.name: missing. Hub id, a folder that `from_pretrained` loads, another run's `final/`, or "
        "a GGUF file.",
        "recipe.yaml:2: training.output_dir: missing. Run folder: metrics, rollouts, checkpoints, the final model, the "
        "report.",
    ]


def test_a_misspelt_required_key_is_not_also_missing(write):
    text = GOOD.replace("output_dir", "outputdir")
    assert only_problem(write(text)) == "recipe.yaml:9: training.outputdir: unknown key, did you mean output_dir?"


def test_everything_at_once_in_order(write):
    text = """\
model: {name: some/model, dtype: bf16}
data:
  name: countdown
  max_prompt_length: 8 prompts
  system_prompt: Be brief.
rewards:
  - {name: countdown}
rollout:
  num_generations: 1
  use_vllm: true
algorithm:
  num_minibatches: 5
  sync_ref_model: true
optimizer:
  learning_rat: 1e-6
  learning_rat: 1e-5
training:
  output_dir: runs/test
  per_device_train_batch_size: 8
"""
    lines = problems(write(text), "training.prompts_per_step=32", "rollout.top_p=2", "evaluation.reward=format")
    places = [line.split(" ")[0] for line in lines]
    assert places[:10] == [f"recipe.yaml:{n}:" for n in (1, 4, 5, 9, 10, 13, 16, 16, 19)] + ["override"], lines
    assert lines[-3:] == [
        "override training.prompts_per_step=32: training.prompts_per_step (32) is not divisible by "
        "algorithm.num_minibatches (5)",
        "override rollout.top_p=2: must be at most 1, got 2. Nucleus sampling: smallest set of tokens with this "
        "probability; 1.0 is off.",
        "override evaluation.reward=format: evaluation.reward: format is not one of rewards (countdown)",
    ]
    assert len(lines) == 12


def test_checks_between_keys_say_nothing_of_values_that_are_wrong_themselves(write):
    text = GOOD + "algorithm: {num_minibatches: 5, sync_ref_model: true, beta: much}\n"
    lines = problems(write(text), "training.prompts_per_step=many")
    assert lines == [
        "recipe.yaml:10: algorithm.beta: expected a number, got 'much'",
        "override training.prompts_per_step=many: expected an integer, got 'many'",
    ]


def test_the_guilty_key_is_the_validators_and_not_a_word_of_its_sentence(write):
    text = GOOD + "evaluation: {reward: data}\n"
    expected = "recipe.yaml:10: evaluation.reward: data is not one of rewards (countdown, format)"
    assert only_problem(write(text), "data={name: countdown}") == expected
    text = GOOD + "prompts: {replay_groups: 4}\n"
    found = only_problem(write(text), "rollout.min_p=0.1")
    assert found.startswith("override rollout.min_p=0.1: prompts.replay_groups needs importance ratios")


WORST = {  # sections that break as many rules as fit into one section at once
    "algorithm": [
        {"delta": 1.0, "sync_ref_model": True, "loss_type": "gspo", "importance_sampling_level": "token",
         "kl_in_reward": True, "use_bias_correction_kl": True, "clip_cov_lb": 9.0, "use_adaptive_entropy": True,
         "entropy_coef": 2.0, "baseline": "none", "multi_objective_aggregation": "normalize_then_sum", "pass_at_k": 2},
        {"loss_type": "kl_cov", "top_entropy_quantile": 0.5, "pass_at_k": 2, "baseline": "batch",
         "scale_rewards": "batch"},
        {"loss_type": "rloo", "baseline": "group", "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 0.2},
    ],
    "data": [{"system_prompt": "x", "chat_template_kwargs": {"a": 1}}],
    "rewards": [{}, {"path": "no_colon"}],
    "rollout": [
        {"vllm_mode": "server", "vllm_python": "x", "max_staleness": 1},
        {"backend": "vllm", "vllm_mode": "server", "vllm_python": "x", "vllm_weight_transfer": "ipc"},
        {"backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": ["x", "x"]},
        {"backend": "vllm", "vllm_group_port": 9, "vllm_weight_transfer": "nccl"},
    ],
    "evaluation": [{"temperature": 0.0, "num_generations": 2}],
    "model": [
        {"name": "x.gguf", "load_in_4bit": True},
        {"name": "x", "weights": "bfloat16", "dtype": "float32", "lora": {}},
    ],
    "": [
        {"model": {"name": "x", "weights": "bfloat16"}, "optimizer": {"optim": "paged_adamw_8bit", "offload": True}},
        {"evaluation": {"reward": "x"}, "training": {"output_dir": "x", "prompts_per_step": 3}, "rewards": [],
         "algorithm": {"num_minibatches": 2, "sync_ref_model": True, "beta": 1.0, "pass_at_k": 64},
         "model": {"name": "x", "lora": {}}, "prompts": {"replay_groups": 1},
         "rollout": {"backend": "vllm", "top_k": 1}},
        {"rewards": [{"name": "format", "weight": 0.0}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("section", "given"), [(name, given) for name, all in WORST.items() for given in all])
def test_every_problem_names_keys_of_the_schema(section, given):
    if not section:
        given = {"model": {"name": "x"}, "data": {"name": "countdown"}, "training": {"output_dir": "x"}} | given
    with pytest.raises(ValidationError) as caught:
        sections()[section].model_validate(given)
    (detail,) = caught.value.errors()
    keys = {f"{name}.{key}".lstrip(".") for name, model in sections().items() for key in model.model_fields}
    for problem in detail["ctx"]["error"].problems:
        assert {f"{section}.{key}".lstrip(".") for key in problem.keys} <= keys, problem


# --- files that are no recipe ---

EMPTY = "recipe.yaml: the file is empty; a recipe has sections such as model:, data: and training:"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", EMPTY),
        (b"# nothing yet\n", EMPTY),
        (b"- model\n", "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), got a list"),
        (b"hello\n", "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), got 'hello'"),
        (b"model:\n  name: caf\xe9\n", "recipe.yaml:2: not UTF-8 text (byte 0xe9); save the file as UTF-8"),
        (b"model:\n\tname: x\n", "recipe.yaml:2: not valid YAML: found character '\\t' that cannot start any token; "
         "indent with spaces, not tabs"),
        (b"model: {name: x\n", "recipe.yaml:2: not valid YAML: expected ',' or '}', but got '<stream end>'"),
        (b"a: b: c\n", "recipe.yaml:1: not valid YAML: mapping values are not allowed here; check the indentation, and "
         "quote text that holds ': '"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML: but found another document"),
        (b"a: *b\n", "recipe.yaml:1: not valid YAML: found undefined alias 'b'"),
        (b"a: 1\nb: \x00\n", "recipe.yaml:2: not valid YAML: the character '\\x00' is not allowed"),
        (b"[" * 500, "recipe.yaml: nested too deeply"),
    ],
)  # fmt: skip
def test_no_recipe_at_all(write, content, message):
    assert only_problem(write(content)) == message


# --- hints ---


def test_hints_point_at_keys_that_exist():
    keys = {f"{name}.{key}".lstrip(".") for name, section in sections().items() for key in section.model_fields}
    assert not {place.partition(": ")[0] for place in RENAMED.values()} - keys


def test_no_hint_denies_a_key_that_exists():
    leaves = {key: name for name, section in sections().items() for key in section.model_fields}
    assert not leaves.keys() & NOT_HERE.keys()
    assert not [key for key in leaves if key.startswith(tuple(PREFIXES))]
    moved = {name: place.partition(": ")[0] for name, place in RENAMED.items() if name in leaves}
    assert {name: f"{leaves[name]}.{name}" for name in moved} == moved


@pytest.mark.parametrize(
    "name",
    [
        "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "use_vllm", "bf16",
        "vllm_gpu_memory_utilization", "vllm_mode", "use_liger_loss", "logging_steps", "warmup_ratio", "fp16",
        "num_train_epochs", "report_to", "save_strategy", "model_name_or_path", "dataset_name", "kl_coef", "lr",
        "rollout.n", "torch_dtype", "reward_funcs", "reward_weights", "max_prompt_length",
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "algorithm.kl_ctrl.kl_coef", "trainer.logger", "n_samples_per_prompt", "fsdp_config", "hub_model_id",
    ],
)  # fmt: skip
def test_foreign_names_are_known(name):
    assert foreign(name)


def test_a_foreign_section_is_told_key_by_key(write):
    text = GOOD + "actor_rollout_ref:\n  actor:\n    optim: {lr: 1e-6}\n  rollout:\n    n: 8\n"
    assert problems(write(text)) == [
        "recipe.yaml:12: actor_rollout_ref.actor.optim.lr: unknown key: `lr` is `optimizer.learning_rate` here",
        "recipe.yaml:14: actor_rollout_ref.rollout.n: unknown key: `n` is `rollout.num_generations` here",
    ]


def test_every_choice_of_the_schema_is_reachable_from_yaml():
    """A choice that YAML would read as something else than text (as YAML 1.1 reads ``off``) could never be given."""
    for section in sections().values():
        for field in section.model_fields.values():
            schema = TypeAdapter(field.annotation).json_schema() if get_args(field.annotation) else {}
            for choice in schema.get("enum", []):
                assert parse(choice).value == choice
