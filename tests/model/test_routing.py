"""Routers: which modules they are, what they choose in the update and in the copy that samples, and their biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.tiny import write_tiny_model
from grpo.backends.hf.backend import HFBackend
from grpo.config import AlgorithmConfig
from grpo.errors import UserError
from grpo.model.policy import Policy
from grpo.model.routing import routers_of, routing_of
from grpo.run.state import Progress, restore_state, save_state
from tests.conftest import make_policy, make_recipe
from tests.gradient_of_step import sequences
from tests.small_models import LATENT, SMALL

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
EXPERTS |= {"n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "decoder_sparse_step": 1}
# Kind, its experts' settings, whether scores are sigmoids, whether there is a bias.
KINDS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "mixtral": ({}, False, False),
    "qwen3_moe": ({}, False, False),
    "deepseek_v3": (LATENT | {"first_k_dense_replace": 0}, True, True),
    "glm4_moe": ({"first_k_dense_replace": 0}, True, True),
    "minimax_m2": ({}, True, True),
    "granitemoe": ({}, False, False),
    "gpt_oss": ({}, False, False),
}
RATE = {"router_bias_update_rate": 0.25}
MOVING = RATE | {"beta": 0.1, "sync_ref_model": True}


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of DeepSeek-V3's shape, its routers' biases not zero."""
    folder = tmp_path_factory.mktemp("tiny_moe")
    write_tiny_model(folder, arch="deepseek_v3")
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    for name, buffer in causal_lm.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.05)
    causal_lm.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_routers_are_found_by_what_transformers_says(kind: str) -> None:
    settings, sigmoid, biased = KINDS[kind]
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | EXPERTS | settings))
    routing = routing_of(causal_lm, AlgorithmConfig())
    assert routing is not None
    assert [router.sigmoid for router in routing.routers] == [sigmoid] * SMALL["num_hidden_layers"]
    assert [router.bias is not None for router in routing.routers] == [biased] * SMALL["num_hidden_layers"]
    ids_RN = torch.randint(3, 500, (3, 7))
    with routing.recorded() as layers:
        causal_lm(ids_RN)
    assert len(layers) == SMALL["num_hidden_layers"]
    for layer in layers:
        assert layer.logits_NE.shape == (21, 4)
        assert layer.chosen_NK.shape == (21, 2)
        assert layer.logits_NE.requires_grad
        if not biased:
            assert torch.equal(layer.chosen_NK.sort().values, layer.logits_NE.topk(2).indices.sort().values)
    with torch.no_grad(), routing.recorded() as layers:
        causal_lm(ids_RN)
    assert layers == [], "only what has a gradient counts"


def test_what_a_model_does_not_have_is_refused() -> None:
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL))
    assert routing_of(dense, AlgorithmConfig()) is None
    with pytest.raises(UserError, match=r"algorithm.router_aux_loss_coef: LlamaForCausalLM has no experts"):
        routing_of(dense, AlgorithmConfig(router_aux_loss_coef=0.1))
    without_bias = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **SMALL | EXPERTS))
    with pytest.raises(UserError, match=r"router_bias_update_rate: the routers of Qwen3MoeForCausalLM have no bias"):
        routing_of(without_bias, AlgorithmConfig(**RATE))


def test_the_tiny_mixture_computes_packed_rows_and_the_same_as_padded_ones(tiny_moe: Path) -> None:
    policy = make_policy(tiny_moe)
    assert policy.packed
    micro_batch = sequences()
    packed_BT = policy.logprobs(policy.collate(micro_batch), 1.0)[0].detach()
    policy.packed = False
    padded_BT = policy.logprobs(policy.collate(micro_batch), 1.0)[0].detach()
    torch.testing.assert_close(packed_BT, padded_BT, atol=1e-4, rtol=1e-4)
    saved = policy.trained_state()
    assert all("e_score_correction_bias" not in name for name in saved), "checkpoints are as before"


@pytest.fixture(scope="module")
def in_bfloat16(tiny_moe: Path) -> tuple[Policy, HFBackend]:
    """A policy whose biases move, its reference too, and what samples for it."""
    policy = make_policy(tiny_moe, dtype="bfloat16", needs_reference=True, algorithm=MOVING)
    return policy, HFBackend(policy, max_batch_size=4)


@pytest.mark.slow
def test_in_bfloat16_the_update_routes_as_the_copy_that_samples(in_bfloat16: tuple[Policy, HFBackend]) -> None:
    """Under autocast a router's float32 product would be rounded to bfloat16; the copy has no autocast."""
    policy, backend = in_bfloat16
    assert policy.routing is not None
    assert policy.reference is not None
    backend.sync(policy, 0)
    with backend._weights():
        twin = dict(backend.model.named_modules())
        for model in (policy.causal_lm, policy.reference.causal_lm):
            for router in routers_of(model):
                hidden_NH = torch.randn(200, 128, generator=torch.Generator().manual_seed(1))
                with policy.autocast():
                    found = router.module(hidden_NH)
                expected = twin[router.name](hidden_NH.bfloat16())
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    router = policy.routing.routers[0].module
    with policy.autocast():
        router(torch.randn(4, 128))[0].sum().backward()
    assert router.weight.grad.dtype == torch.float32
    assert router.weight.grad.abs().sum() > 0
    policy.optimizer.zero_grad()


@pytest.mark.slow
def test_a_moved_bias_reaches_copy_reference_checkpoint_and_final(
    in_bfloat16: tuple[Policy, HFBackend], tiny_moe: Path, tmp_path: Path
) -> None:
    policy, backend = in_bfloat16
    assert policy.routing is not None
    before = {name: bias.clone() for name, bias in policy.routing.biases.items()}
    move = torch.tensor([1 / 3] * 8)
    policy.routing.move_biases([move] * 3)
    policy.mix_reference(0.5)
    policy.step(1e-3)
    backend.sync(policy, 1)
    policy.save_pretrained(tmp_path / "final")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final").state_dict()
    recipe = make_recipe(
        tiny_moe, model={"dtype": "bfloat16"}, algorithm=MOVING, training={"output_dir": str(tmp_path)}
    )
    save_state(tmp_path, recipe, policy, Progress(step=1))
    resumed = make_policy(tiny_moe, dtype="bfloat16", needs_reference=True, algorithm=MOVING)
    restore_state(tmp_path / "checkpoints" / "step_000001", recipe, resumed)
    with backend._weights():
        held = backend.model.state_dict()
        for name, bias in before.items():
            moved = bias + move
            assert not torch.equal(moved, moved.bfloat16().float()), "rounding would show"
            for state in (policy.causal_lm.state_dict(), held, final, resumed.causal_lm.state_dict()):
                assert torch.equal(state[name].float(), moved)
            for one in (policy, resumed):
                assert one.reference is not None
                assert torch.equal(one.reference.causal_lm.state_dict()[name], bias.lerp(moved, 0.5))
