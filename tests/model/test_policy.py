"""Weights in and out of the policy: LoRA merged and apart, the reference, what is saved, learning rates."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo.errors import UserError
from grpo.model.logprob_lm import LogprobLM
from grpo.model.policy import Policy
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

LORA = {"model": {"lora": {"r": 4, "lora_alpha": 8}}}


def perturb_adapters(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 60, 7, 80, 9]])).logits


def test_lora_trains_adapters_alone_in_float32_over_a_base_in_the_compute_type(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, dtype="bfloat16", **LORA)
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        assert parameter.dtype is (torch.float32 if "lora_" in name else torch.bfloat16)


def test_full_state_of_lora_is_peft_s_merge_and_leaves_the_policy_alone(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, **LORA)
    perturb_adapters(policy)
    before = {name: t.clone() for name, t in policy.model.state_dict().items()}
    state = policy.full_state()
    assert all(torch.equal(t, before[name]) for name, t in policy.model.state_dict().items())
    merged = copy.deepcopy(policy.peft_model).merge_and_unload().state_dict()
    assert state.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_reference_of_lora_is_its_base(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, needs_reference=True, **LORA)
    batch = policy.collate(sequences())
    base = policy.logprobs(batch, 1.0)[0].detach()
    perturb_adapters(policy)
    assert not torch.allclose(policy.logprobs(batch, 1.0)[0], base, atol=1e-3)
    torch.testing.assert_close(policy.reference_logprobs(batch, 1.0), base)


def test_final_is_merged_with_the_adapter_beside_it_and_a_later_stage_starts_from_it(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    policy = make_policy(tiny_model, **LORA)
    perturb_adapters(policy)
    policy.save_pretrained(tmp_path / "final")
    expected = logits(policy.causal_lm)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), expected)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "final/adapter")), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").eos_token == policy.tokenizer.eos_token
    later = make_policy(tmp_path / "final", **LORA)  # new adapters start at nothing, over the merged weights
    torch.testing.assert_close(logits(later.causal_lm), expected)


def test_lora_on_modules_that_do_not_exist_is_a_user_error(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="no_such_layer"):
        make_policy(tiny_model, model={"lora": {"target_modules": ["no_such_layer"]}})


@pytest.mark.parametrize("sections", [{}, LORA], ids=["full", "lora"])
def test_trained_state_goes_out_and_back_in_bit_for_bit(tiny_model: Path, sections: dict) -> None:
    policy, other = make_policy(tiny_model, **sections), make_policy(tiny_model, **sections)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    other.load_trained_state({name: t.clone() for name, t in policy.trained_state().items()})
    assert all(torch.equal(t, policy.full_state()[name]) for name, t in other.full_state().items())


def test_the_reference_moves_by_alpha(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, needs_reference=True)
    assert policy.reference is not None
    name, before = next((n, t.clone()) for n, t in policy.reference.causal_lm.state_dict().items() if t.ndim == 2)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    policy.mix_reference(0.6)
    torch.testing.assert_close(policy.reference.causal_lm.state_dict()[name], before + 0.6)


def test_gradient_checkpointing_changes_no_gradient(tiny_model: Path) -> None:
    gradients = []
    for on in (False, True):
        policy = make_policy(tiny_model, model={"gradient_checkpointing": on})
        policy.logprobs(policy.collate(sequences()), 1.0)[0].sum().backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_weights_that_are_no_numbers_are_told_of_as_such(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"the logits of this LlamaForCausalLM are nan"):
        LogprobLM(model).check()


def test_a_model_that_makes_logits_another_way_is_refused(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = model.lm_head.forward
    scored = LogprobLM(model)
    scored.check()
    model.forward = lambda **kw: type(model).forward(model, **kw) | {"logits": 2 * plain(torch.ones(1, 80, 128))}
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        scored.check()
