"""The memory that a recipe's header states: its parts against real models, the sums of every header, what fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from grpo import kernels
from grpo.backends.hf import backend, kv_cache
from grpo.config import OptimizerConfig
from grpo.config.load import load_recipe
from grpo.model.devices import LARGEST
from grpo.model.devices import LOGITS as SIZES
from grpo.model.logprob_lm import LogprobLM
from grpo.model.memory_budget import (
    AUTOMATIC_SHARE,
    CACHE_SHARE,
    FEWEST_TOKENS,
    KEPT_SHARE,
    LOGITS,
    MOST_TOKENS,
    budget,
    card_of,
)
from grpo.model.optimizer import make_optimizer
from grpo.model.shape import QWEN, Shape, shape_of
from grpo.packing import collate
from grpo.plan import cpu_memory, plan
from grpo.run import rollback
from grpo.types import TrainedSequence
from grpo.update import micro_batch_size
from tests.conftest import make_recipe
from tests.launching import ROOT

RECIPES = ROOT / "recipes"
STATED = [file for file in sorted(RECIPES.glob("*.yaml")) if "\n# memory " in file.read_text()]
SMALL = Shape(layers=6, hidden=96, mlp=512, heads=4, kv_heads=2, head_dim=24, vocabulary=500)


def model_of(shape: Shape, device: str) -> torch.nn.Module:
    config = (Qwen3Config if shape.head_norms else Qwen2Config)(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("shape", QWEN.values(), ids=QWEN)
def test_parameters_are_those_of_the_model(shape: Shape) -> None:
    model = model_of(shape, "meta")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    assert shape.linears == sum(m.weight.numel() for m in linears)
    assert shape.adapters(8) == sum(8 * (m.in_features + m.out_features) for m in linears)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_token_keeps_what_is_counted_for_it(checkpointing: bool) -> None:
    model = model_of(SMALL, "cpu").train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kernels.install(model, torch.device("cpu"), trains=True, alone=True)
    lm = LogprobLM(model)

    def kept(tokens: int) -> int:
        batch = collate([TrainedSequence([1] * (tokens - 8), [2] * 8, [0.0] * 8, 1.0)], pad_token_id=0, packed=False)
        with torch.autocast("cpu", torch.bfloat16):
            return kernels.measure_kept(lambda: lm.hidden_states(batch))

    a_token = (kept(1500) - kept(500)) / 1000
    counted = SMALL.kept_token(checkpointing=checkpointing)
    if checkpointing:  # the layer that is computed again comes later, in the backward pass
        counted -= 2 * (8 * SMALL.hidden + 2 * SMALL.kv_heads * SMALL.head_dim + 4 * SMALL.mlp)
    assert a_token == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_the_optimizer_holds_what_is_counted_for_it(tmp_path: Path, weights: str, optim: str) -> None:
    layer = torch.nn.Linear(512, 512, bias=False, dtype=getattr(torch, weights))
    optimizer = make_optimizer(layer, OptimizerConfig(optim=optim))
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    held = sum(t.nbytes for t in optimizer.state[layer.weight].values()) / layer.weight.numel()
    recipe = make_recipe(tmp_path, model={"dtype": "bfloat16", "weights": weights}, optimizer={"optim": optim})
    shape = QWEN["qwen2.5-3b"]
    found = budget(recipe, shape, 80e9)
    assert found.update["AdamW"] / shape.parameters == pytest.approx(held, rel=1e-3)
    assert found.update["weights"] / shape.parameters == layer.weight.element_size()
    offloaded = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"offload": True})})
    assert budget(offloaded, shape, 80e9).update["AdamW"] == 0
    # CachingHostAllocator.h rounds page-locked memory up to a power of two.
    kept = [t.nbytes / layer.weight.numel() for n, t in optimizer.state[layer.weight].items() if n != "step"]
    sizes = [p.numel() * each for p in model_of(shape, "meta").parameters() for each in kept]
    page_locked = sum(1 << (round(size) - 1).bit_length() for size in sizes)
    assert budget(offloaded, shape, 80e9).host["AdamW"] == pytest.approx(page_locked, rel=1e-3)


def test_sizes_that_are_written_down_twice_agree() -> None:
    assert (CACHE_SHARE, KEPT_SHARE) == (backend.CACHE_SHARE, backend.KEPT_SHARE)
    assert (AUTOMATIC_SHARE, FEWEST_TOKENS) == (micro_batch_size.SHARE, micro_batch_size.SMALLEST)
    assert LARGEST["accelerator"][0] == MOST_TOKENS
    assert LARGEST["cpu"] == (cpu_memory.TOKENS_AT_MOST, cpu_memory.KEPT_AT_MOST)
    assert rollback.KEPT == plan.KEPT
    assert SIZES["cpu"].chunk == SIZES["cpu"].kept == cpu_memory.LOGIT_CHUNK
    assert kv_cache.SHORT_PROMPT == cpu_memory.SHORT_PROMPT
    chunk, tile, kept = SIZES["accelerator"]
    assert pytest.approx(2 * chunk + 2 * kept + 3 * 4 * tile, rel=0.03) == LOGITS


@pytest.mark.parametrize("file", STATED, ids=lambda file: file.stem)
def test_a_header_states_the_budget_and_the_card_holds_it(file: Path) -> None:
    header = file.read_text().partition("\nmodel:")[0]
    (stated,) = re.findall(r"^# memory +(.*(?:\n#  .*)*)", header, re.MULTILINE)
    (hardware,) = re.findall(r"^# hardware +(.*)", header, re.MULTILINE)
    card, shape = card_of(hardware), shape_of(file.stem)
    assert card is not None
    assert shape is not None
    recipe = load_recipe(file)
    found = budget(recipe, shape, card)
    assert re.sub(r"\n# +", " ", stated) == " ".join(found.lines())
    with_hf = budget(recipe.with_backend("hf"), shape, card)
    for parts in (found.update, found.rollout, with_hf.update, with_hf.rollout):
        assert sum(parts.values()) < 0.95 * card
    for line in found.lines():
        total, *parts = map(float, re.findall(r"\d+\.\d(?= |$)", line))
        assert sum(parts) == pytest.approx(total, abs=0.05 * (len(parts) + 1))


@pytest.mark.parametrize("card", ["24 GB", "80 GB"])
@pytest.mark.parametrize("size", [name for name in QWEN if "qwen2.5" in name])
def test_every_size_has_a_recipe_for_either_card(size: str, card: str) -> None:
    fitting = [f for f in STATED if size in f.stem and f"\n# hardware  one GPU of {card}" in f.read_text()]
    assert fitting
