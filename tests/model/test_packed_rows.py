"""Packed rows give what padded rows give, value and gradient, or the model is found unable to."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama import modeling_llama

from grpo.kernels.packed_attention import attention, register
from grpo.model import packed_check
from grpo.model.logprob_lm import LogprobLM
from grpo.model.packed_check import made_up, why_padded
from grpo.packing import collate, packed_tokens
from grpo.types import TrainedSequence
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

needs_a_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX") or "g++") is None, reason="without one a CPU's policy computes padded rows"
)
CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 192,  # heads of 32, which a CPU has compiled attention for
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 97, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
CAN = {
    "llama": LlamaConfig(**SMALL),
    "llama without shared heads": LlamaConfig(**SMALL | {"num_key_value_heads": 6}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "mistral without a window": MistralConfig(**SMALL, sliding_window=None),
    "gpt2": GPT2Config(**GPT2),
}


def model(config: Any, **keywords: Any) -> LogprobLM:
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(config, **keywords)
    register()
    if causal_lm.config._attn_implementation == "sdpa":  # by hand, so that it is done without a compiler too
        causal_lm.set_attn_implementation("grpo_packed")
    return LogprobLM(causal_lm)


def gradients(scored: LogprobLM, batch: list[TrainedSequence], packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of a sum in which every one has another weight."""
    scored.zero_grad()
    logps_BT = scored(collate(batch, pad_token_id=0, packed=packed), 0.9)[0]
    (logps_BT * torch.arange(logps_BT.numel()).view_as(logps_BT).cos()).sum().backward()
    found = [p.grad.flatten().double() for p in scored.parameters() if p.grad is not None]
    return logps_BT.detach(), torch.cat(found)


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", CAN)
def test_they_are_those_of_padded_rows(name: str, checkpointing: bool) -> None:
    scored = model(CAN[name])
    assert why_padded(scored, CPU, torch.float32) is None
    if checkpointing:
        scored.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for batch in (made_up(97)[0], made_up(97)[0][:1], [s for s in made_up(97)[0] if len(s.completion_ids) == 1]):
        (packed, grad), (padded, expected) = (gradients(scored, batch, way) for way in (True, False))
        torch.testing.assert_close(packed, padded, atol=1e-5, rtol=0)
        assert differ(grad, expected) < 1e-5


@needs_a_compiler
@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}])
def test_in_bfloat16_they_are_as_near_as_it_allows(tiny_model: Path, tmp_path: Path, lora: dict | None) -> None:
    """Nearer to float32's than twice the padded rows are; with LoRA (on the head too) the base is bfloat16 itself."""
    section = {"model": {"lora": lora}} if lora else {}
    if lora:  # a tied head can have no adapter
        causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model)
        causal_lm.config.tie_word_embeddings = False
        causal_lm.lm_head.weight = nn.Parameter(causal_lm.lm_head.weight.detach().clone())
        tiny_model = Path(shutil.copytree(tiny_model, tmp_path / "untied"))
        causal_lm.save_pretrained(tiny_model)
    exact = make_policy(tiny_model)
    exact_BT = exact.logprobs(exact.collate(sequences()), 1.0)[0]
    policy = make_policy(tiny_model, dtype="bfloat16", **section)
    found = {}
    for packed in (True, False):
        policy.packed = packed
        policy.model.zero_grad()
        logps_BT, _ = policy.logprobs(policy.collate(sequences()), 1.0)
        logps_BT.sum().backward()
        trained = [p for p in policy.model.parameters() if p.requires_grad]
        found[packed] = logps_BT.detach(), torch.cat([p.grad.flatten() for p in trained])
    off = {packed: float((logps_BT - exact_BT).norm()) for packed, (logps_BT, _) in found.items()}
    assert off[True] < 2 * off[False]
    assert differ(found[True][1], found[False][1]) < 0.05


def test_attention_in_two_parts_is_attention_under_the_mask() -> None:
    """Through the interface, with grouped heads, a scale of its own, and gradients of all three inputs."""
    layout = collate(made_up(97)[0], pad_token_id=0).layout
    assert layout is not None
    N = layout.segments[-1]
    segment_N = torch.bucketize(torch.arange(N), torch.tensor(layout.segments[1:]), right=True)
    group_N = torch.cat([segment_N[: layout.groups[0]], torch.zeros(N - layout.groups[0])]).long()
    for g, (start, end) in enumerate(zip(layout.groups, layout.groups[1:], strict=False)):
        group_N[start:end] = g
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    mask_NN = (segment_N[i] == segment_N[j]) & (j <= i)
    mask_NN |= (i >= layout.groups[0]) & (j < layout.groups[0]) & (group_N[i] == group_N[j])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, N, 16, requires_grad=True) for heads in (6, 2, 2))
    weights = torch.randn(1, N, 6, 16)
    ours, _ = attention(torch.nn.Identity(), query, key, value, None, scaling=0.3, layout=layout)
    found = torch.autograd.grad(ours, (query, key, value), weights)
    plain = scaled_dot_product_attention(query, key, value, attn_mask=mask_NN, scale=0.3, enable_gqa=True)
    expected = torch.autograd.grad(plain.transpose(1, 2), (query, key, value), weights)
    torch.testing.assert_close(ours, plain.transpose(1, 2), atol=1e-5, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@needs_a_compiler
def test_a_prompt_is_computed_once_for_its_completions(tiny_model: Path) -> None:
    policy = make_policy(tiny_model)
    seen = []
    policy.causal_lm.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    policy.logprobs(policy.collate(sequences()), 1.0)
    assert seen == [packed_tokens(sequences())]
    assert packed_tokens(sequences()) < sum(len(s) for s in sequences()) - 8


CANNOT = {
    "a sliding window": (MistralConfig(**SMALL, sliding_window=64), {}, "sliding window"),
    "layers with windows": (Gemma2Config(**SMALL), {}, "layers of sliding attention"),
    "soft-capping": (
        Gemma2Config(**SMALL, layer_types=["full_attention"] * 2, attn_logit_softcapping=50.0),
        {"attn_implementation": "sdpa"},
        "soft-capped",
    ),
    "dropout": (LlamaConfig(**SMALL, attention_dropout=0.1), {}, "dropout"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_models_that_cannot_say_why(name: str) -> None:
    config, keywords, reason = CANNOT[name]
    assert reason in str(why_padded(model(config, **keywords), CPU, torch.float32))


def test_rounding_of_stored_weights_does_not_make_rows_padded() -> None:
    """A model in bfloat16 is checked in float32, where its packed and padded rows agree; its weights stay as they are.
    In bfloat16 this one, with all its weights small, would seem not to tell right positions from wrong ones."""
    config = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=511)  # fmt: skip
    scored = model(config).to(torch.bfloat16)
    before = {name: weight.clone() for name, weight in scored.named_parameters()}
    assert why_padded(scored, CPU, torch.bfloat16) is None
    assert all(torch.equal(weight, before[name]) for name, weight in scored.named_parameters())


def ignoring(forward: Any, name: str) -> Any:
    def without(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop(name, None)
        return forward(*args, **kwargs)

    return without


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_positions_is_found_out(dtype: torch.dtype) -> None:
    scored = model(CAN["llama"]).to(dtype)
    base = scored.causal_lm.base_model
    base.forward = ignoring(base.forward, "position_ids")
    assert why_padded(scored, CPU, dtype) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["as it is", "none"])
def test_a_model_that_does_not_hand_the_layout_down_is_found_out(dtype: torch.dtype, mask: str) -> None:
    scored = model(CAN["llama"]).to(dtype)
    for layer in scored.causal_lm.base_model.layers:
        layer.self_attn.forward = ignoring(layer.self_attn.forward, "layout")
        if mask == "none":
            layer.self_attn.forward = ignoring(layer.self_attn.forward, "attention_mask")
    assert why_padded(scored, CPU, dtype) is not None


def test_one_layer_that_sees_only_its_own_segment_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest mistake: completions that do not see their prompt, in the last layer alone."""
    scored = model(CAN["llama"])
    last = scored.causal_lm.base_model.layers[-1].self_attn

    def forward(*args: Any, layout: Any = None, **kwargs: Any) -> Any:
        if layout is not None:
            whole = layout.groups[-1]
            layout = packed_check.replace(layout, groups=[whole] * len(layout.groups))
        return modeling_llama.LlamaAttention.forward(last, *args, layout=layout, **kwargs)

    monkeypatch.setattr(last, "forward", forward)
    assert "differ by up to" in str(why_padded(scored, CPU, torch.float32))


@needs_a_compiler
def test_the_log_says_which_way_and_why(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert make_policy(tiny_model).packed
    assert "update: packed rows" in caplog.text
    assert not make_policy(tiny_model, model={"attn_implementation": "eager"}).packed
    assert "padded rows, which are slower, for LlamaForCausalLM: its attention is eager, not sdpa" in caplog.text


def leaky(config: Any, share: float) -> LogprobLM:
    """A model whose first layer adds a running sum of all tokens before, which no row's beginning resets."""
    scored = model(config)
    layer = scored.causal_lm.model.layers[0]
    forward = layer.forward

    def leaks(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = torch.zeros_like(hidden[:, 0])
        before = []
        for t in range(hidden.shape[1]):
            before.append(state)
            state = 0.5 * state + hidden[:, t]
        return forward(hidden + share * torch.stack(before, 1), *args, **kwargs)

    layer.forward = leaks
    return scored


@pytest.mark.parametrize(("share", "found"), [(1.0, "differ by up to"), (1e-3, "a state passes from row to row")])
def test_a_state_that_leaks_between_packed_rows_is_found_however_little(share: float, found: str) -> None:
    """The smaller leak moves log-probabilities by less than packed and padded rows may differ."""
    config = LlamaConfig(**SMALL)
    assert why_padded(leaky(config, 0.0), CPU, torch.float32) is None
    assert found in str(why_padded(leaky(config, share), CPU, torch.float32))


@pytest.mark.parametrize(("kind", "layers"), [("lfm2", "conv"), ("qwen3_5_text", "linear_attention")])
def test_recurrent_layers_are_named_and_found_where_nobody_names_them(
    kind: str, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real hybrids, whose states nothing resets in a packed row. Then the check is not told of their layers."""
    delta = {f"linear_{name}": 16 for name in ("key_head_dim", "value_head_dim")}
    delta |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    kinds = [layers, "full_attention"]
    scored = model(AutoConfig.for_model(kind, **SMALL | {"head_dim": 32, "layer_types": kinds} | delta))
    assert f"layers of {layers.replace('_', ' ')}" in str(why_padded(scored, CPU, torch.float32))
    monkeypatch.setattr(LogprobLM, "config", property(lambda self: LlamaConfig(**SMALL)))
    assert "differ by up to" in str(why_padded(scored, CPU, torch.float32))


def test_a_window_that_only_masks_tell_is_found_where_rows_may_pass_it() -> None:
    """Attention is not told of it, and rows of the usual check do not reach it."""
    scored = model(MistralConfig(**SMALL, sliding_window=100))
    told = copy.deepcopy(scored.config)
    told.sliding_window = None
    for layer in scored.causal_lm.model.layers:
        layer.self_attn.config = told
    assert why_padded(scored, CPU, torch.float32, longest=90) is None
    assert "in one of 108 tokens" in str(why_padded(scored, CPU, torch.float32, longest=200))
