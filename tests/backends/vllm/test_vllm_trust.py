"""What the checks of a vLLM server find: every settings sentence, every kind of wrong weight, the wrong temperature."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from grpo.backends.vllm import trust

F32, BF16 = torch.float32, torch.bfloat16
LAYER = "model.layers.0.self_attn"
QKV = [f"{LAYER}.{part}_proj.weight" for part in "qkv"]


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def entry(held: torch.Tensor, parts: list[str], stride: int = 1) -> dict[str, Any]:
    """What a worker says of a tensor that it holds (for ``stride``, of the columns that it read)."""
    doubles = held.double()
    return {
        "parts": parts,
        "stride": stride,
        "sum": float(doubles.sum()),
        "squares": float((doubles * doubles).sum()),
    }


def attention() -> dict[str, torch.Tensor]:
    """Queries of 8 heads, keys and values of 2, of 4 rows each."""
    rows = zip(QKV, (32, 8, 8), strict=True)
    return {name: tensor(n, 16, seed=i) for i, (name, n) in enumerate(rows)}


def different(found: list[dict[str, Any]], state: dict[str, torch.Tensor], dtype: torch.dtype = F32) -> list[str]:
    names, unknown = trust.fingerprint_problems(found, state, dtype)
    assert unknown == []
    return names


# --- weights ---


def test_weights_that_are_the_same_have_no_problem() -> None:
    state = {"a.weight": tensor(5, 7), "a.bias": tensor(5, seed=1)}
    assert different([{name: entry(t, [name]) for name, t in state.items()}], state) == []


def test_the_engines_type_is_what_is_compared() -> None:
    state = {"a.weight": tensor(50, 70)}
    found = [{"a.weight": entry(state["a.weight"].to(BF16), ["a.weight"])}]
    assert different(found, state, BF16) == []
    assert different(found, state, F32) == ["a.weight"]


def test_what_the_model_keeps_in_float32_is_compared_in_the_type_that_the_engine_holds_it_in() -> None:
    state = {"a.weight": tensor(5, 7, dtype=BF16), "a.router_bias": tensor(5, seed=1)}
    rounded, exact = (
        entry(state["a.router_bias"].to(BF16), ["a.router_bias"]),
        entry(state["a.router_bias"], ["a.router_bias"]),
    )
    rest = {"a.weight": entry(state["a.weight"], ["a.weight"]) | {"dtype": "bfloat16"}}
    assert different([rest | {"a.router_bias": exact | {"dtype": "float32"}}], state, BF16) == []
    assert different([rest | {"a.router_bias": rounded | {"dtype": "bfloat16"}}], state, BF16) == []
    assert different([rest | {"a.router_bias": rounded | {"dtype": "float32"}}], state, BF16) == ["a.router_bias"]


def test_parts_that_the_engine_fused_are_compared_together() -> None:
    state = attention()
    found = [{f"{LAYER}.qkv_proj.weight": entry(torch.cat([state[name] for name in QKV]), QKV)}]
    assert different(found, state) == []
    for name in QKV:
        changed = state[name].clone()
        changed[3, 5] += 1e-4
        assert different(found, state | {name: changed}) == [f"{LAYER}.qkv_proj.weight"]


def test_the_order_of_elements_does_not_matter() -> None:
    state = {"a.weight": tensor(200, 300)}
    shuffled = state["a.weight"].flatten()[torch.randperm(60_000)]
    for held in (state["a.weight"].T, shuffled, shuffled.reshape(100, 600)):
        assert different([{"a.weight": entry(held, ["a.weight"])}], state) == []


def test_of_a_packed_matrix_every_so_many_columns_are_compared() -> None:
    state = {"a.weight": tensor(6, 10)}
    found = [{"a.weight": entry(state["a.weight"][:, ::3].T, ["a.weight"], stride=3)}]
    assert different(found, state) == []
    for column, seen in ((3, True), (4, False)):
        changed = state["a.weight"].clone()
        changed[2, column] += 1e-3
        assert different(found, {"a.weight": changed}) == (["a.weight"] if seen else [])


@pytest.mark.parametrize("row", [0, 2047])
def test_one_changed_element_of_a_large_bfloat16_tensor_shows(row: int) -> None:
    """One of two million moves to the next number that the type has."""
    state = {"embed.weight": tensor(2048, 1024, dtype=BF16) * 0.02}
    held = state["embed.weight"].clone()
    held[row, 7] = torch.nextafter(held[row, 7], torch.tensor(1.0, dtype=BF16))
    assert held.ne(state["embed.weight"]).sum() == 1
    assert different([{"embed.weight": entry(held, ["embed.weight"])}], state, BF16) == ["embed.weight"]


def test_a_changed_sign_shows_though_squares_do_not_move() -> None:
    state = {"a.weight": tensor(100, 100)}
    held = state["a.weight"].clone()
    held[1, 1] *= -1
    assert different([{"a.weight": entry(held, ["a.weight"])}], state) == ["a.weight"]


def test_two_changes_that_cancel_in_the_sum_show_in_the_squares() -> None:
    state = {"a.weight": tensor(100, 100)}
    held = state["a.weight"].clone()
    held[1, 1] += 0.125
    held[2, 2] -= 0.125
    assert different([{"a.weight": entry(held, ["a.weight"])}], state) == ["a.weight"]


def test_a_change_too_small_for_the_squares_shows_in_the_sum() -> None:
    state = {"a.weight": torch.full((300, 300), 0.02)}
    held = state["a.weight"].clone()
    held[1, 1] += 1e-7
    assert different([{"a.weight": entry(held, ["a.weight"])}], state) == ["a.weight"]


def test_the_weights_of_the_step_before_are_different_in_every_parameter() -> None:
    state = {f"{i}.weight": tensor(64, 64, seed=i) for i in range(5)}
    found = [{name: entry(t, [name]) for name, t in state.items()}]
    learned = {name: t + 1e-6 * tensor(64, 64, seed=9) for name, t in state.items()}
    assert different(found, learned) == list(state)


def test_numbers_that_are_none_are_different() -> None:
    state = {"a.weight": tensor(4, 4)}
    found = [{"a.weight": entry(state["a.weight"], ["a.weight"]) | {"squares": math.nan, "sum": math.nan}}]
    assert different(found, state) == ["a.weight"]


def test_a_parameter_that_the_trainer_does_not_know_is_named_as_such() -> None:
    state = attention()
    found = [
        {
            "rotary.table": entry(tensor(3), ["rotary.table"]),
            f"{LAYER}.qkv_proj.weight": entry(torch.cat([state[name] for name in QKV]), [*QKV[:2], "another.weight"]),
            QKV[0]: entry(state[QKV[0]], [QKV[0]]),
        }
    ]
    assert trust.fingerprint_problems(found, state, F32) == ([], ["rotary.table", f"{LAYER}.qkv_proj.weight"])


# --- weights over several workers ---


def workers(held: list[torch.Tensor], name: str, parts: list[str], stride: int = 1) -> list[dict[str, Any]]:
    return [{name: entry(t, parts, stride)} for t in held]


@pytest.mark.parametrize("size", [2, 4])
def test_a_parameter_may_be_split_over_workers_or_the_same_on_all(size: int) -> None:
    state = {"a.weight": tensor(16, 8)}
    rows, columns = state["a.weight"].chunk(size), state["a.weight"].chunk(size, dim=1)
    for held in (list(rows), list(columns), [state["a.weight"]] * size):
        assert different(workers(held, "a.weight", ["a.weight"]), state) == []


@pytest.mark.parametrize("size", [2, 4])
def test_one_wrong_worker_of_several_shows(size: int) -> None:
    state = {"a.weight": tensor(16, 8)}
    wrong = state["a.weight"].clone()
    wrong[15, 7] += 1e-4
    split = [*state["a.weight"].chunk(size)[:-1], wrong.chunk(size)[-1]]
    for held in (split, [*[state["a.weight"]] * (size - 1), wrong], split[:-1] + split[:1]):
        assert different(workers(held, "a.weight", ["a.weight"]), state) == ["a.weight"]


@pytest.mark.parametrize(("size", "copies"), [(2, 1), (4, 2), (8, 4)])
def test_keys_and_values_of_few_heads_are_on_several_workers_each(size: int, copies: int) -> None:
    """With more workers than key-value heads (2), vLLM splits queries and repeats keys and values."""
    state = attention()
    name = f"{LAYER}.qkv_proj.weight"

    def held(state: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        q, k, v = (state[part] for part in QKV)
        pieces = [
            torch.cat([q.chunk(size)[w], k.chunk(size // copies)[w // copies], v.chunk(size // copies)[w // copies]])
            for w in range(size)
        ]
        return workers(pieces, name, QKV)

    assert different(held(state), state) == []
    for part in QKV:
        changed = state[part].clone()
        changed[0, 0] += 1e-4
        assert different(held(state | {part: changed}), state) == [name]


def test_workers_of_a_pipeline_hold_different_layers() -> None:
    state = {"0.weight": tensor(4, 4), "1.weight": tensor(4, 4, seed=1)}
    found = [{name: entry(t, [name])} for name, t in state.items()]
    assert different(found, state) == []
    assert different(found, state | {"1.weight": tensor(4, 4, seed=2)}) == ["1.weight"]


def test_packed_columns_of_a_split_matrix_cannot_be_compared() -> None:
    state = {"a.weight": tensor(16, 8)}
    found = workers([t[:, ::2] for t in state["a.weight"].chunk(2)], "a.weight", ["a.weight"], stride=2)
    assert trust.fingerprint_problems(found, state, F32) == ([], ["a.weight"])


# --- adapters ---

MLP = "model.layers.0.mlp"
SCALE = 2.5


def adapter() -> dict[str, torch.Tensor]:
    """Of three projections, by peft's names."""
    named = {}
    for i, layer in enumerate((f"{MLP}.gate_proj", f"{MLP}.up_proj", f"{MLP}.down_proj")):
        named[f"base_model.model.{layer}.lora_A.weight"] = tensor(4, 32, seed=i)
        named[f"base_model.model.{layer}.lora_B.weight"] = tensor(64, 4, seed=i + 10) * 1e-3
    return named


def held_adapter(adapter: dict[str, torch.Tensor], dtype: torch.dtype = F32, scale: float = SCALE) -> dict[str, Any]:
    """What an engine says that holds these: gate and up fused, B multiplied by the scale in the engine's type."""

    def squares(layer: str) -> dict[str, float]:
        a = adapter[f"base_model.model.{MLP}.{layer}_proj.lora_A.weight"].to(dtype).double()
        b = (adapter[f"base_model.model.{MLP}.{layer}_proj.lora_B.weight"].to(dtype) * scale).double()
        return {"a": float((a * a).sum()), "b": float((b * b).sum())}

    gate, up = squares("gate"), squares("up")
    fused = {"parts": [f"{MLP}.gate_proj", f"{MLP}.up_proj"], **{side: gate[side] + up[side] for side in "ab"}}
    return {f"{MLP}.gate_up_proj": fused, f"{MLP}.down_proj": {"parts": [f"{MLP}.down_proj"], **squares("down")}}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("scale", [1.0, SCALE, 1 / 3])
def test_adapters_that_are_the_same_have_no_problem(dtype: torch.dtype, scale: float) -> None:
    assert trust.adapter_problems(held_adapter(adapter(), dtype, scale), adapter(), scale, dtype) == []


def test_adapters_of_another_scale_are_wrong_in_b_alone() -> None:
    assert trust.adapter_problems(held_adapter(adapter()), adapter(), 1.1 * SCALE, F32) == [
        f"{MLP}.gate_up_proj.lora_B",
        f"{MLP}.down_proj.lora_B",
    ]


@pytest.mark.parametrize("matrix", ["A", "B"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_adapters_of_the_step_before_are_named(matrix: str, dtype: torch.dtype) -> None:
    """A step of learning moves every element by a thousandth of its size."""
    name = f"base_model.model.{MLP}.up_proj.lora_{matrix}.weight"
    before = adapter()
    now = before | {name: before[name] + 1e-3 * before[name].std() * tensor(*before[name].shape, seed=99)}
    if dtype == BF16:
        assert not torch.equal(now[name].to(BF16), before[name].to(BF16))
    found = held_adapter(before, dtype)
    assert trust.adapter_problems(found, now, SCALE, dtype) == [f"{MLP}.gate_up_proj.lora_{matrix}"]


def test_adapters_that_the_engine_lacks_are_named_as_missing() -> None:
    found = held_adapter(adapter())
    del found[f"{MLP}.down_proj"]
    assert trust.adapter_problems(found, adapter(), SCALE, F32) == [
        f"{MLP}.down_proj.lora_A (missing)",
        f"{MLP}.down_proj.lora_B (missing)",
    ]


def test_adapters_that_start_at_zero_may_be_missing() -> None:
    zero = {name: torch.zeros_like(t) for name, t in adapter().items()}
    assert trust.adapter_problems({}, zero, SCALE, F32) == []


def test_adapters_that_the_trainer_lacks_are_named() -> None:
    found = held_adapter(adapter()) | {"other": {"parts": ["other"], "a": 1.0, "b": 0.0}}
    assert trust.adapter_problems(found, adapter(), SCALE, F32) == ["other.lora_A"]


def test_adapters_that_are_not_numbers_are_wrong() -> None:
    found = held_adapter(adapter())
    found[f"{MLP}.down_proj"]["b"] = math.nan
    assert trust.adapter_problems(found, adapter(), SCALE, F32) == [f"{MLP}.down_proj.lora_B"]


def test_the_message_of_different_weights_names_five_of_them() -> None:
    text = trust.different_weights("http://a:1", 7, [f"p{i}" for i in range(9)], 27)
    assert "vllm server http://a:1 does not hold the policy's weights of version 7: 9 of 27 parameters differ" in text
    assert "p0, p1, p2, p3, p4 and 4 more" in text
    assert "p5" not in text
    assert ": p0. If all" in trust.different_weights("http://a:1", 7, ["p0"], 27)


# --- settings ---

FITTING: dict[str, Any] = {
    "model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.bfloat16", "max_model_len": 512},
    "lora_config": {"max_lora_rank": 16},
    "parallel_config": {"worker_extension_cls": "grpo.backends.vllm.worker.WorkerExtension"},
}


def settings_problems(version: str = "0.32.0", *, adapters: bool = True, **changed: Any) -> list[str]:
    settings = copy.deepcopy(FITTING)
    for place, value in changed.items():
        section, _, name = place.partition("__")
        if name:
            settings[section][name] = value
        else:
            settings[section] = value
    return trust.settings_problems(version, settings, dtype="bfloat16", length=512, adapters=adapters)


def test_settings_that_fit_have_no_problem() -> None:
    assert settings_problems() == []
    assert settings_problems(adapters=False, lora_config=None) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"version": "0.34.0"}, "it is vLLM 0.34.0; grpo supports vllm>=0.32,<0.34"),
        ({"model_config__logprobs_mode": "raw_logprobs"},
         "its --logprobs-mode is raw_logprobs; training needs processed_logprobs (temperature included)"),
        ({"model_config__dtype": "torch.float16"},
         "it computes in float16, the recipe says bfloat16: start it with --dtype bfloat16, or set "
         "rollout.vllm_dtype: float16"),
        ({"model_config__dtype": "float32"},
         "it computes in float32, the recipe says bfloat16: start it with --dtype bfloat16, or set "
         "rollout.vllm_dtype: float32"),
        ({"model_config__max_model_len": 511},
         "its --max-model-len is 511; data.max_prompt_length and the longest completion together are 512"),
        ({"lora_config": None},
         "adapters travel alone (rollout.vllm_lora_sync), which needs --enable-lora --max-lora-rank R"),
        ({"parallel_config__worker_extension_cls": ""}, "it lacks grpo's worker extension"),
    ],
)  # fmt: skip
def test_each_setting_that_does_not_fit_has_its_sentence(changed: dict[str, Any], sentence: str) -> None:
    assert settings_problems(**changed) == [sentence]


def test_all_that_does_not_fit_is_said_at_once() -> None:
    wrong = settings_problems("0.31.9", model_config__max_model_len=100, model_config__logprobs_mode="raw_logits")
    assert [line.split()[1] for line in wrong] == ["is", "--logprobs-mode", "--max-model-len"]


# --- distribution ---

PROBE = trust.Probe("http://a:1", [1, 2], [[3, 4, 5], [6]], [[-0.5, -1.0, -1.5], [-2.0]])


def shifted(by: float) -> list[list[float]]:
    return [[logprob + by for logprob in row] for row in PROBE.logprobs]


def message(scored_at: dict[float, list[list[float]]], *, temperature: float = 0.6, tolerance: float = 1e-3) -> str:
    found = trust.probe_difference(PROBE, scored_at[temperature])
    return trust.wrong_distribution(PROBE, found, tolerance, temperature, scored_at)


def test_the_difference_over_a_probe_is_absolute_and_over_all_its_tokens() -> None:
    found = trust.probe_difference(PROBE, [[-0.4, -1.3, -1.5], [-2.4]])
    assert found == {"mean": pytest.approx(0.2), "max": pytest.approx(0.4)}


def test_a_temperature_that_explains_the_difference_is_named() -> None:
    text = message({0.6: shifted(0.5), 0.7: shifted(1e-4), 1.0: shifted(-0.4)})
    assert "vllm server http://a:1 does not sample from the policy's distribution: over a probe of 4 tokens" in text
    assert "differ from the trainer's by 0.5000 nats on average (0.5000 at most; tolerance 0.001)" in text
    assert text.endswith("They are those of temperature 0.7; the recipe's is 0.6")


def test_logprobs_without_temperature_name_the_argument_that_cures_them() -> None:
    text = message({0.6: shifted(0.5), 0.7: shifted(0.4), 1.0: shifted(1e-5)})
    assert "They are those of temperature 1.0; the recipe's is 0.6: start the server with" in text
    assert text.endswith("--logprobs-mode processed_logprobs")


def test_a_difference_that_no_temperature_explains_says_so() -> None:
    text = message({0.6: shifted(0.5), 0.7: shifted(0.4), 1.0: shifted(0.3)})
    assert "They are those of temperature" not in text
    assert "No temperature explains it. Usual causes: another rope or attention setting" in text
    assert "raise rollout.vllm_probe_tolerance" in text


def test_logprobs_that_are_not_numbers_are_explained_by_none() -> None:
    nothing = [[math.nan] * 3, [math.nan]]
    assert "No temperature explains it" in message(dict.fromkeys((0.6, 0.7, 1.0), nothing))
