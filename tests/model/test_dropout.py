"""A policy that learns is the one that samples: what a model's configuration makes random in training is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import UserError
from grpo.model.policy import Policy
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

SIZE: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128}
RANDOM = {
    "dropout of every kind": ("gpt2", {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}),
    "rates that modules keep as numbers": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.3}),
    "layers left out": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64, "dropout": 0.0, "layerdrop": 0.5}),
    "rates that modules ask the configuration for": ("falcon", {"hidden_dropout": 0.3}),
    "noise on a router": (
        "mixtral",
        {"intermediate_size": 64, "num_key_value_heads": 1, "num_local_experts": 2, "router_jitter_noise": 0.5},
    ),
}


def policy_of(kind: str, settings: dict[str, Any], folder: Path, **sections: Any) -> Policy:
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZE | settings))
    return make_policy(folder, causal_lm=causal_lm, **sections)


def moved(policy: Policy) -> float:
    """How far two passes of a policy that learns are from each other, and from one in which it samples, at most."""
    batch = policy.collate(sequences())
    with torch.no_grad():
        one, other = (policy.model.train()(batch, 1.0)[0] for _ in range(2))
        sampled = policy.model.eval()(batch, 1.0)[0]
    return float(torch.maximum((one - other).abs(), (one - sampled).abs()).max())


@pytest.mark.parametrize("what", RANDOM)
def test_what_is_random_in_a_model_is_off(what: str, tiny_model: Path) -> None:
    assert moved(policy_of(*RANDOM[what], tiny_model)) < 1e-5


@pytest.mark.parametrize("what", RANDOM)
def test_it_stays_where_the_recipe_asks_for_it(what: str, tiny_model: Path) -> None:
    assert moved(policy_of(*RANDOM[what], tiny_model, model={"disable_dropout": False})) > 1e-3


def test_loras_own_dropout_is_what_the_recipe_says(tiny_model: Path) -> None:
    lora = {"r": 4, "lora_dropout": 0.5, "target_modules": ["c_attn"]}
    policy = policy_of(*RANDOM["dropout of every kind"], tiny_model, model={"lora": lora})
    rates = {module.p for module in policy.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.0, 0.5}


def test_the_exported_model_keeps_the_rates_of_its_configuration(tiny_model: Path, tmp_path: Path) -> None:
    policy = policy_of(*RANDOM["dropout of every kind"], tiny_model)
    policy.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).attn_pdrop == 0.2


def test_what_is_random_by_another_name_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.model.dropout.NOISE", "nothing")
    with pytest.raises(UserError, match="MixtralForCausalLM computes other hidden states in training mode"):
        policy_of(*RANDOM["noise on a router"], tiny_model)
