"""Weights that text does not reach are frozen; those that a router only passed over are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from grpo.model.logprob_lm import LogprobLM
from grpo.model.unused import without_gradient
from tests.conftest import make_policy
from tests.gradient_of_step import sequences
from tests.small_models import IMAGES, SMALL, VISION


def multimodal() -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3", text_config=SMALL | {"sliding_window": 8}, vision_config=VISION, **IMAGES)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_a_text_trainer_trains_a_multimodal_model_s_text_part(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, lora: dict[str, int] | None
) -> None:
    caplog.set_level(logging.INFO, "grpo")
    policy = make_policy(tiny_model, causal_lm=multimodal(), model={"lora": lora})
    assert "weights that no text reaches stay as they are" in caplog.text
    assert "model.vision_tower" in caplog.text
    logps_BT = policy.logprobs(policy.collate(sequences()), 1.0)[0]
    logps_BT.sum().backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert {name.split(".")[2] for name in trained} == {"language_model"}
    held = sum(len(group["params"]) for group in policy.optimizer.param_groups)
    assert held == len(trained), "the optimizer holds no moments of the others"


def test_layers_that_fsdp_is_told_of_are_those_that_exist() -> None:
    """Gemma 3 names layers of vision towers that it was not made with."""
    causal_lm = multimodal()
    there = {type(module).__name__ for module in causal_lm.modules()}
    assert not set(causal_lm._no_split_modules) <= there
    units = LogprobLM(causal_lm)._no_split_modules
    assert set(units) <= there
    assert "Gemma3DecoderLayer" in units
    causal_lm._no_split_modules = None
    assert LogprobLM(causal_lm)._no_split_modules == ["Gemma3DecoderLayer"]


class Routed(nn.Module):
    """Experts of which the first alone is used, a list of spare layers, and a weight that nobody uses."""

    def __init__(self, size: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.spare = nn.ModuleList(nn.Linear(size, size) for _ in range(2))
        self.idle = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[0](x)


def test_an_expert_that_few_tokens_passed_over_is_trained() -> None:
    config = LlamaConfig(**SMALL)
    causal_lm = AutoModelForCausalLM.from_config(config)
    for layer in causal_lm.model.layers:
        layer.mlp = Routed(config.hidden_size)
    found = without_gradient(LogprobLM(causal_lm))
    per_layer = {"idle", "spare.0.weight", "spare.0.bias", "spare.1.weight", "spare.1.bias"}
    assert set(found) == {f"causal_lm.model.layers.{i}.mlp.{name}" for i in range(2) for name in per_layer}


@pytest.mark.slow
def test_a_pass_of_the_reference_trains_no_more_adapters_than_before(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, causal_lm=multimodal(), model={"lora": {"r": 4}}, needs_reference=True)
    names = policy.trained_state().keys()
    policy.reference_logprobs(policy.collate(sequences()), 1.0)
    assert policy.trained_state().keys() == names


@pytest.mark.slow
def test_moments_from_when_all_weights_were_optimized_are_taken_up(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, causal_lm=multimodal())
    every = list(policy.model.parameters())
    groups = [{"params": [p for p in every if p.ndim >= 2]}, {"params": [p for p in every if p.ndim < 2]}]
    before = torch.optim.AdamW(groups)
    for p in every:
        p.grad = torch.randn_like(p) if p.requires_grad else None
    before.step()
    policy.load_optimizer_state(before.state_dict())
    for p in (p for p in every if p.requires_grad):
        assert torch.equal(policy.optimizer.state[p]["exp_avg"], before.state[p]["exp_avg"])
