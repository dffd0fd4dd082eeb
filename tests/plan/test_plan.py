"""`grpo plan`: counts against a model's own, budgets term by term, cures that cure, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, Qwen3MoeConfig

from grpo.config.load import load_recipe
from grpo.errors import UserError
from grpo.model.memory_budget import budget
from grpo.model.shape import Shape, find_shape, shape_from, shape_of
from grpo.plan.cards import CARDS, sheet_for
from grpo.plan.cpu_seconds import Line
from grpo.plan.plan import Plan, plan_for_gpus
from grpo.plan.text import WIDTH, lines
from grpo.plan.work import Lengths, assumed_lengths, work_of_step
from tests.cli.conftest import ROOT, run

LLAMA = LlamaConfig(
    num_hidden_layers=3, hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=500, tie_word_embeddings=False,
)  # fmt: skip
MOE = Qwen3MoeConfig(
    num_hidden_layers=2, hidden_size=64, intermediate_size=160, moe_intermediate_size=32, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=500, num_experts=6, num_experts_per_tok=2, tie_word_embeddings=True,
)  # fmt: skip


V3 = DeepseekV3Config(
    num_hidden_layers=4, first_k_dense_replace=1, hidden_size=64, intermediate_size=160, moe_intermediate_size=32,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=8, v_head_dim=20, n_routed_experts=6, num_experts_per_tok=2, n_shared_experts=2, vocab_size=500,
    tie_word_embeddings=False,
)  # fmt: skip


def planned(recipe: str, card: str, *overrides: str, gpus: int = 1, fsdp2: bool = False, **known: float) -> Plan:
    read = load_recipe(ROOT / "recipes" / f"{recipe}.yaml", list(overrides))
    given: dict[str, Any] = {"prompt": None, "completion": None, "with_signal": None} | known
    lengths = assumed_lengths(read, **given)
    return plan_for_gpus(read, find_shape(read.model.name), CARDS[card], lengths, gpus=gpus, fsdp2=fsdp2, price=2.0)


@pytest.mark.parametrize("config", [LLAMA, MOE, V3], ids=["llama", "qwen3_moe", "deepseek_v3"])
def test_a_shape_is_read_from_a_config_and_has_as_many_weights_as_the_model(config: Any, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = find_shape(str(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    of_token = shape.experts_of_token / shape.experts
    assert shape.active_parameters == shape.parameters - experts * (1 - of_token)
    heads = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}
    assert shape.linears == experts + sum(m.weight.numel() for m in heads.values())
    assert sum(shape.matrices(None)) == shape.linears + shape.embedding * (1 if shape.tied else 2)


def test_operations_of_latent_attention_and_experts_are_those_that_torch_counts() -> None:
    """Attention of one row over all pairs: queries and keys are larger than values."""
    shape = shape_from(V3.to_dict(), "here")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(V3, attn_implementation="eager")
    attention = model.model.layers[1].self_attn
    with FlopCounterMode(display=False) as counter:
        rotary = model.model.rotary_emb(torch.zeros(1, 40, 64, device="meta"), torch.arange(40, device="meta")[None])
        attention(torch.zeros(1, 40, 64, device="meta"), rotary, None)
    assert shape.latent is not None
    linears = shape.latent.linears(shape.hidden, shape.heads, shape.head_dim)
    products = 2.0 * 40 * sum(i * o * count for i, o, count in linears)
    assert products + 4.0 * shape.attention_width * 40 * 40 == counter.get_total_flops()
    assert shape.kv_token == 2 * 4 * 4 * (24 + 20)
    assert shape.kv_token_of_vllm == 2 * 4 * (16 + 8)


def test_a_mixture_s_plan_tells_what_a_token_takes(tmp_path: Path) -> None:
    V3.save_pretrained(tmp_path)
    result = run("plan", "smoke_cpu", f"model.name={tmp_path}", "--gpu", "80gb")
    shape = find_shape(str(tmp_path))
    every, active = (f"{count / 1e6:.1f} M" for count in (shape.parameters, shape.active_parameters))
    assert result.stdout.splitlines()[0].startswith(f"{every} parameters ({active} of them for a token) on A100")
    found = json.loads(run("plan", "smoke_cpu", f"model.name={tmp_path}", "--gpu", "80gb", "--json").stdout)
    assert (found["parameters"], found["active_parameters"]) == (shape.parameters, shape.active_parameters)


def test_operations_are_those_that_torch_counts() -> None:
    shape = shape_from(LLAMA.to_dict(), "here")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA, attn_implementation="eager")
        ids = torch.zeros((1, 40), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.model(ids)
    recipe = load_recipe(ROOT / "recipes" / "smoke_cpu.yaml", ["training.prompts_per_step=1"])
    one = Lengths(prompt=10, completion=30, longest=30)
    head = 2.0 * shape.embedding * 8 * 30
    counted = work_of_step(recipe, shape, one).update_flops / 3 - head
    products, wide = 2.0 * shape.products_of_token, shape.heads * shape.head_dim
    causal = 4.0 * shape.layers * wide
    full = counter.get_total_flops()  # of one row, attention over all pairs
    assert products * 40 + causal * 40 * 40 == pytest.approx(full, rel=0.02)
    assert counted == pytest.approx(products * (10 + 8 * 30) + causal * (10 * 10 / 2 + 8 * 30 * (10 + 15)))


def test_an_environments_tokens_are_read_and_not_drawn() -> None:
    """They cost what a prompt's do, for each completion; its seconds nobody knows, and the plan says so."""
    shape = shape_from(LLAMA.to_dict(), "here")
    game = [
        "environment={name: number_guess, max_turns: 4, max_observation_length: 10}",
        "rewards=[{name: environment}]",
    ]
    recipe = load_recipe(ROOT / "recipes" / "smoke_cpu.yaml", ["training.prompts_per_step=1", *game])
    without, played = (Lengths(prompt=10, completion=30, longest=30, environment=e) for e in (0.0, 20.0))
    assert assumed_lengths(recipe, prompt=None, completion=None, with_signal=None).environment == 4 * 10 / 2
    few, many = (work_of_step(recipe, shape, lengths) for lengths in (without, played))
    products, causal = 2.0 * shape.products_of_token, 4.0 * shape.layers * shape.attention_width
    pairs = 50 * (10 + 25) - 30 * (10 + 15)
    assert (many.update_flops - few.update_flops) / 3 == pytest.approx(8 * (products * 20 + causal * pairs))
    assert many.prefill_flops - few.prefill_flops == pytest.approx(8 * products * 20)
    assert many.completion_tokens == few.completion_tokens
    found = planned("countdown_qwen2.5-0.5b", "80gb", *game)
    assert any("how long it takes to answer is not known" in text for text in found.assumptions)
    assert all(len(line) <= WIDTH for line in lines(found))


def test_3b_on_80_gb_term_by_term() -> None:
    parts = planned("countdown_qwen2.5-3b", "80gb").memory
    state = parts.update["weights"] + parts.update["AdamW"] + parts.update["gradients"]
    assert state == pytest.approx(49.4e9, rel=0.01)
    assert parts.update["reference"] == pytest.approx(6.2e9, rel=0.01)
    assert parts.rollout["vLLM"] == pytest.approx(0.3 * 85.5e9, rel=0.01)
    assert parts.update["activations"] == pytest.approx(0.32e6 * 16384, rel=0.4)  # checkpointed: 0.32 MB a token


def test_lora_3b_fits_24_gb_and_all_weights_do_not() -> None:
    assert planned("countdown_qwen2.5-3b_lora_24gb", "24gb").fits
    too_much = planned("countdown_qwen2.5-3b", "24gb")
    assert not too_much.fits
    assert too_much.cures
    for cure in too_much.cures:
        overrides = [change.replace("'", "") for change in cure]
        assert planned("countdown_qwen2.5-3b", "24gb", *overrides).fits, cure


def test_sharding_divides_what_belongs_to_weights() -> None:
    recipe, shape = load_recipe(ROOT / "recipes/countdown_qwen2.5-3b.yaml", []), shape_of("qwen2.5-3b")
    assert shape is not None
    whole, shard = budget(recipe, shape, 85.5e9), budget(recipe, shape, 85.5e9, shards=4)
    for part in ("weights", "AdamW", "gradients", "reference"):
        assert shard.update[part] == whole.update[part] / 4
    assert shard.update["activations"] == whole.update["activations"]
    assert shard.update["gathered layers"] > 0


def test_more_gpus_take_less_time_and_the_same_money_but_for_weights() -> None:
    one, four = planned("countdown_qwen2.5-3b", "h100"), planned("countdown_qwen2.5-3b", "h100", gpus=4)
    assert one.hours is not None
    assert four.hours is not None
    assert one.hours / 4 < four.hours < one.hours
    assert four.dollars == pytest.approx(4 * four.hours * 2.0)


def test_longer_completions_and_more_signal_cost_more() -> None:
    def step(**known: float) -> float:
        found = planned("countdown_qwen2.5-3b", "h100", **known)
        assert found.seconds is not None
        return found.seconds.step

    assert step(completion=100) < step(completion=200)
    assert step(with_signal=0.5) < step(with_signal=1.0)


def test_a_line_goes_through_two_measurements() -> None:
    assert Line.through((2, 5.0), (6, 9.0)) == Line(fixed=3.0, each=1.0)
    assert Line.through((4, 8.0), (4, 8.0)).at(8) == 16.0
    assert Line.through((2, 5.0), (6, 4.0)).at(100) == 4.0, "noise makes no work of negative time"


@pytest.mark.parametrize("recipe", ["countdown_qwen2.5-3b", "countdown_qwen2.5-0.5b_sft", "gsm8k_qwen3-1.7b"])
@pytest.mark.parametrize("card", CARDS)
def test_a_plan_reads_on_80_columns(recipe: str, card: str) -> None:
    found = list(lines(planned(recipe, card)))
    assert max(map(len, found)) <= WIDTH
    assert any(line.startswith("It ") for line in found)


def test_json_has_the_figures_by_name() -> None:
    result = run("plan", "countdown_qwen2.5-3b", "--gpu", "80GB", "--price", "2.5", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fits"] is True
    assert found["dollars"] == pytest.approx(2.5 * found["hours"])
    assert found["peak_bytes"] == round(max(sum(found["memory"][peak].values()) for peak in ("update", "rollout")))
    assert found["step_seconds"] > 0


def test_a_plan_for_a_card_imports_no_torch() -> None:
    code = (
        "import sys; from grpo.cli.main import app\n"
        "app(['plan', 'countdown_qwen2.5-3b', '--gpu', 'h100'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "a100"], "--gpu: a100 is not one of cpu (this machine), 24gb (RTX 4090, 24 GB), 48gb (L40S, 48 GB)"),
        (["--gpus", "8"], "--gpus: say which with --gpu: 24gb, 48gb"),
        (["--fsdp2"], "--fsdp2: say which with --gpu: 24gb, 48gb"),
        (["--gpu", "h100", "model.name=nobody/knows"], "--config FILE"),
        (["--gpu", "h100", "--config", "nosuch.json"], "--config: nosuch.json: no such file"),
        (["--gpu", "h100", "--config", "README.md"], "cannot be read as a model's configuration"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str) -> None:
    result = run("plan", "countdown_qwen2.5-3b", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_models_of_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="type mamba is not one whose memory is counted"):
        shape_from({"model_type": "mamba"}, "config.json")


@pytest.mark.slow
def test_a_plan_for_this_cpu_times_the_real_work() -> None:
    result = run("plan", "smoke_cpu", "training.num_threads=1", "--length", "12", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["fits"] is True
    assert found["seconds"]["rollout"] > 0
    assert found["seconds"]["update"] > 0
    assert 0.4e9 < found["peak_bytes"] < 1e9


@pytest.mark.parametrize(
    ("name", "memory", "like"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42.3e9, "80gb"),
        ("NVIDIA GeForce RTX 4090", 25.4e9, "24gb"),
        ("NVIDIA GeForce RTX 3090", 25.7e9, "24gb"),
        ("NVIDIA RTX 6000 Ada Generation", 50.9e9, "48gb"),
        ("Tesla T4", 15.6e9, None),
    ],
)
def test_a_device_is_planned_for_by_the_sheet_of_its_name_or_of_a_smaller_card(
    name: str, memory: float, like: str | None
) -> None:
    found = sheet_for(name, memory)
    assert found == (None if like is None else replace(CARDS[like], title=name, bytes=memory))


def test_the_table_of_shapes_needs_no_file() -> None:
    assert find_shape("Qwen/Qwen2.5-3B") == shape_of("qwen2.5-3b")
    assert isinstance(shape_of("Qwen/Qwen3-1.7B-Base"), Shape)


def test_a_model_that_grpo_ships_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_shape("data/tiny_base").layers == 4
