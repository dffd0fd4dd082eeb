"""Adapters, whatever they are added to, are merged into what ``from_pretrained`` loads, or refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import UserError
from grpo.model.policy import Policy
from tests.conftest import make_policy
from tests.gradient_of_step import sequences
from tests.small_models import SMALL

UNTIED = SMALL | {"tie_word_embeddings": False}
GPT2 = {"vocab_size": 511, "n_embd": 32, "n_layer": 2, "n_head": 2, "eos_token_id": 1, "bos_token_id": 1}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
ALL = "all-linear"
MERGED: dict[str, tuple[str, dict[str, Any], str | list[str]]] = {
    "fused experts and their router": ("qwen3_moe", UNTIED | EXPERTS, ALL),
    "experts alone": ("qwen3_moe", UNTIED | EXPERTS, ["gate_proj", "up_proj", "down_proj"]),
    "experts of another layout": ("gpt_oss", UNTIED | EXPERTS, ALL),
    "a head and an embedding of their own": ("llama", UNTIED, ["q_proj", "lm_head", "embed_tokens"]),
    "weights held transposed": ("gpt2", GPT2, ALL),
    "positions": ("gpt2", GPT2, ["c_attn", "wpe"]),
}
AFMOE = UNTIED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_dense_layers": 1}
AFMOE |= {"layer_types": ["full_attention"] * 2}


def model(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def move_adapters(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def logits(causal_lm: Any) -> torch.Tensor:
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        return causal_lm.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # peft's, of a pattern that it does heed
@pytest.mark.parametrize("case", MERGED)
def test_final_computes_what_the_policy_does_and_so_does_the_adapter_on_the_base(
    case: str, tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    kind, settings, target_modules = MERGED[case]
    lora = {"r": 4, "target_modules": target_modules}
    policy = make_policy(tiny_model, causal_lm=model(kind, settings), model={"lora": lora})
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    base.load_state_dict(policy.base_state())
    move_adapters(policy)
    expected = logits(policy.causal_lm)
    assert float((logits(base) - expected).abs().max()) > 0.05, "the adapters say something"
    policy.save_pretrained(tmp_path / "final")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), expected, atol=1e-4, rtol=1e-4
    )
    adapted = PeftModel.from_pretrained(base, tmp_path / "final/adapter")
    torch.testing.assert_close(logits(adapted), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_weights_is_refused(layer: str, tiny_model: Path) -> None:
    """``final/`` has one weight for both, and could hold neither."""
    causal_lm = model("llama", UNTIED | {"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"target_modules: .*lm_head.* are one weight \(tied\)"):
        make_policy(tiny_model, causal_lm=causal_lm, model={"lora": {"target_modules": ["q_proj", layer]}})


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"bias": "lora_only"}, {"use_dora": True}, {"lora_bias": True}],
    ids=lambda more: next(iter(more)),
)
def test_what_is_trained_beside_the_product_of_two_matrices_is_refused(
    more: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recipe asks peft for it. If it came all the same, ``final/`` would lack it."""
    import peft

    plain = peft.LoraConfig
    monkeypatch.setattr(peft, "LoraConfig", lambda **settings: plain(**settings | more))
    causal_lm = model("llama", UNTIED | {"attention_bias": True})
    with pytest.raises(UserError, match=r"model\.lora: .* can't be merged"):
        make_policy(tiny_model, causal_lm=causal_lm, model={"lora": {"target_modules": ["q_proj"]}})


@pytest.mark.slow
def test_experts_with_adapters_over_a_base_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    """The checks at the start compute in float32, whatever the base is held in."""
    from data.tiny import write_tiny_model

    write_tiny_model(tmp_path / "base")
    model("qwen3_moe", UNTIED | EXPERTS).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    policy = make_policy(tmp_path / "base", dtype="bfloat16", model={"lora": {"r": 4}})
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    move_adapters(policy)
    logps_BT = policy.logprobs(policy.collate(sequences()), 1.0)[0]
    logps_BT.sum().backward()
    assert all(p.grad is not None for p in policy.model.parameters() if p.requires_grad)


def test_checks_at_the_start_see_adapters_that_add_something(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones add nothing. So a sampler that left out an adapter passed them, and sampled from another model."""
    from grpo.backends.hf import few_row_linear
    from grpo.backends.hf.backend import HFBackend

    policy = make_policy(tiny_model, causal_lm=model("afmoe", AFMOE), model={"lora": {"r": 4}})
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    HFBackend(policy, max_batch_size=4)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.model.named_parameters())
    monkeypatch.setattr(few_row_linear, "is_parametrized", lambda _: False)
    with pytest.raises(UserError, match="AfmoeForCausalLM decodes to other logits"):
        HFBackend(policy, max_batch_size=4)
