"""QLoRA: a base in 4 bits that never changes, adapters that learn over it, the numbers that an engine gets."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo.backends.base import Request, Sampling
from grpo.backends.hf.backend import HFBackend
from grpo.errors import UserError
from grpo.model.placing import shell
from grpo.model.policy import Policy
from grpo.model.quantized import quantization_config
from grpo.types import Prompt
from tests.conftest import make_policy
from tests.gradient_of_step import sequences
from tests.model.test_policy import logits, perturb_adapters

QLORA: dict[str, Any] = {"model": {"load_in_4bit": True, "lora": {"r": 4, "lora_alpha": 8}}}


def qlora(model: Path, dtype: str = "float32", **more: Any) -> Policy:
    return make_policy(model, dtype=dtype, **QLORA, **more)


def bytes_of_base(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn_over_a_base_of_half_a_byte_that_stays_as_it_is(tiny_model: Path, dtype: str) -> None:
    policy = qlora(tiny_model, dtype)
    before = bytes_of_base(policy)
    batch = policy.collate(sequences())
    with torch.no_grad():
        policy.causal_lm.eval()  # passes without gradients are those that bitsandbytes rounds scales for
        start = policy.logprobs(batch, 1.0)[0].sum()
        policy.causal_lm.train()
    for _ in range(10):
        (-policy.logprobs(batch, 1.0)[0].sum()).backward()
        policy.clip_gradients()
        policy.step(1e-2)
    assert float(policy.logprobs(batch, 1.0)[0].sum().detach()) > float(start) + 10
    after = bytes_of_base(policy)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    quantized = [n for n in after if after[n].dtype == torch.uint8]
    assert len(quantized) == 7 * policy.causal_lm.config.num_hidden_layers
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad is ("lora_" in name)
        if "lora_" in name:
            assert parameter.dtype is torch.float32


def test_gradients_of_adapters_are_those_over_the_same_numbers_unquantized(tiny_model: Path) -> None:
    policy = qlora(tiny_model)
    perturb_adapters(policy)
    plain = make_policy(tiny_model, model={"lora": QLORA["model"]["lora"]})
    base = policy.base_state()
    with torch.no_grad():
        for name, parameter in plain.causal_lm.named_parameters():
            if "lora_" in name:
                parameter.copy_(policy.causal_lm.get_parameter(name))
            else:
                parameter.copy_(base[name.replace(".base_layer", "")])
    for one in (policy, plain):
        one.logprobs(one.collate(sequences()), 1.0)[0].sum().backward()
    for name, parameter in plain.causal_lm.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(policy.causal_lm.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-4)


def test_the_reference_is_the_quantized_base(tiny_model: Path) -> None:
    policy = qlora(tiny_model, needs_reference=True)
    batch = policy.collate(sequences())
    base = policy.logprobs(batch, 1.0)[0].detach()
    perturb_adapters(policy)
    assert not torch.allclose(policy.logprobs(batch, 1.0)[0], base, atol=1e-3)
    torch.testing.assert_close(policy.reference_logprobs(batch, 1.0), base)


def test_the_hf_backend_samples_from_base_and_adapters_as_they_are(tiny_model: Path) -> None:
    policy = qlora(tiny_model)
    perturb_adapters(policy)
    backend = HFBackend(policy, max_batch_size=8)
    backend.sync(policy, 0)
    assert backend.model is policy.causal_lm  # nothing is copied, merged or rounded
    prompt = Prompt(id=0, prompt="", text="", token_ids=[5, 60, 7, 80])
    (completions,) = backend.generate([Request(prompt, [1, 2])], Sampling(8), 0)
    for completion in completions:
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        with torch.no_grad():
            logps = policy.causal_lm.eval()(input_ids=ids).logits[0, 3:-1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.sampler_logprobs), expected, atol=1e-4, rtol=1e-4)


def test_final_is_merged_and_no_longer_quantized_and_the_adapter_beside_it_is_exact(
    tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    policy = qlora(tiny_model)
    perturb_adapters(policy)
    expected = logits(policy.causal_lm)
    policy.save_pretrained(tmp_path / "final")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not hasattr(merged.config, "quantization_config")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    base = qlora(tiny_model)
    with_adapter = PeftModel.from_pretrained(base.peft_model.unload(), tmp_path / "final/adapter")
    assert torch.equal(logits(with_adapter), expected)


def test_a_checkpoint_holds_adapters_alone_and_goes_on_exactly(tiny_model: Path) -> None:
    def step(policy: Policy) -> None:
        (-policy.logprobs(policy.collate(sequences()), 1.0)[0].sum()).backward()
        policy.step(1e-2)

    one, other = qlora(tiny_model), qlora(tiny_model)
    step(one)
    saved = {name: tensor.clone() for name, tensor in one.trained_state().items()}
    assert all("lora_" in name for name in saved)
    other.load_trained_state(saved)
    other.load_optimizer_state(copy.deepcopy(one.optimizer_state()))
    step(one)
    step(other)
    for name, tensor in one.trained_state().items():
        assert torch.equal(other.trained_state()[name], tensor), name


def test_weights_that_a_file_holds_quantized_are_not_trained_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    settings = quantization_config(torch.float32)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings, device_map="cpu")
    shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    quantized.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"are quantized \(.*bitsandbytes.*\), so they can't be trained"):
        make_policy(tmp_path / "model")
    config = shell(quantized.config, torch.float32, trust_remote_code=False).config
    assert not hasattr(config, "quantization_config")
    assert hasattr(quantized.config, "quantization_config")


def test_what_is_missing_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"model.load_in_4bit needs bitsandbytes.*pip install"):
        qlora(tiny_model)
