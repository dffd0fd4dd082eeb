"""Private names of transformers and torch: where one is gone, the backend does without it or says what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig

from grpo.backends.base import Request, Sampling
from grpo.backends.hf import attention, check, few_row_linear, step_compiled
from grpo.backends.hf.attention import _attend
from grpo.backends.hf.backend import HFBackend
from grpo.errors import UserError
from grpo.model.policy import Policy
from grpo.randomness import key
from grpo.types import Prompt
from tests.conftest import make_policy

MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 97, "pad_token_id": 0}


@pytest.fixture
def asked_again() -> Iterator[None]:
    """Forget which names were found."""
    for found in (attention._flash_on_cpu, few_row_linear._can_pack):
        found.cache_clear()
    yield
    for found in (attention._flash_on_cpu, few_row_linear._can_pack):
        found.cache_clear()


def tokens(policy: Policy) -> list[int]:
    backend = HFBackend(policy, max_batch_size=8)
    backend.sync(policy, 0)
    return backend.generate([Request(Prompt(0, "", "", [5, 6]), [key(0)])], Sampling(8), 0)[0][0].token_ids


def recurrent(folder: Path) -> Policy:
    config = AutoConfig.for_model("mamba", eos_token_id=1, bos_token_id=None, **MAMBA)
    torch.manual_seed(0)
    return make_policy(folder, causal_lm=AutoModelForCausalLM.from_config(config))


def test_a_recurrent_model_whose_cache_is_unknown_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"MambaForCausalLM decodes to other logits through its cache.*backend: vllm"):
        HFBackend(recurrent(tiny_model), max_batch_size=8)


@pytest.mark.parametrize("name", ["STATEFUL", "CAN_SET"])
def test_without_the_name_a_line_says_so_and_decoding_decides(
    tiny_model: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy = make_policy(tiny_model)
    expected = tokens(policy)
    monkeypatch.setattr(check, name, "_gone")
    assert tokens(policy) == expected
    assert "does not say whether a model keeps a recurrent state" in caplog.text


def test_without_the_names_a_recurrent_model_is_refused_all_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = recurrent(tiny_model)
    monkeypatch.setattr(check, "STATEFUL", "_gone")
    monkeypatch.setattr(check, "CAN_SET", "_gone")
    with pytest.raises(UserError, match=r"MambaForCausalLM decodes to other logits.*rollout\.backend: vllm"):
        HFBackend(policy, max_batch_size=8)


def test_without_the_name_of_its_attention_a_model_is_refused_in_one_line(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tiny_model)
    monkeypatch.delattr(PreTrainedConfig, "_attn_implementation")
    with pytest.raises(
        UserError, match=r"does not tell it \(config\._attn_implementation\); use rollout\.backend: vllm"
    ):
        HFBackend(policy, max_batch_size=8)


@pytest.mark.usefixtures("asked_again")
def test_without_torchs_fused_attention_the_plain_formula_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    query, key_, value = (torch.randn(3, 2, n, 8) for n in (4, 9, 9))
    mask = torch.zeros(3, 9).masked_fill_(torch.arange(9)[None] >= torch.tensor([[9], [1], [5]]), -torch.inf)
    assert attention._flash_on_cpu() is not None
    fused = [_attend(query, key_, value, m, 0.3) for m in (None, mask)]
    attention._flash_on_cpu.cache_clear()
    monkeypatch.setattr(attention, "FLASH_ON_CPU", "_gone")
    plain = [_attend(query, key_, value, m, 0.3) for m in (None, mask)]
    assert attention._flash_on_cpu() is None
    assert "has no _gone" in caplog.text
    torch.testing.assert_close(plain, fused, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("asked_again")
def test_without_onednns_operations_linear_layers_stay_as_they_are(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_compiled, "FAMILIES", frozenset())
    policy = make_policy(tiny_model)
    expected = tokens(policy)
    few_row_linear._can_pack.cache_clear()
    monkeypatch.setattr(few_row_linear, "REORDER", "_gone")
    with caplog.at_level(logging.INFO, "grpo"):
        assert tokens(policy) == expected
    assert caplog.text.count("can't reorder weights") == 1


def test_bfloat16_layers_stay_as_they_are_where_onednn_does_not_say_that_it_multiplies_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    monkeypatch.setattr(few_row_linear, "BFLOAT16_SUPPORTED", "_gone")
    with few_row_linear.packed_linears(layer):
        assert "forward" not in vars(layer)
