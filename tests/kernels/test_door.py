"""What the door installs, and that each part is left out, with one line, where a library lost the name it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo import kernels
from grpo.kernels import grads_in_place, lean_activations, native, packed_attention, packed_attention_compiled
from grpo.model.policy import Policy
from grpo.update.step import optimizer_step
from tests.conftest import make_policy, make_run
from tests.gradient_of_step import sequences


def without(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A torch whose tensors have no such attribute."""

    def gone(self: torch.Tensor) -> Any:
        raise AttributeError(name)

    return lambda patch: patch.setattr(torch.Tensor, name, property(gone), raising=False)


GONE: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "Tensor._base": without("_base"),
    "Tensor._is_view": without("_is_view"),
    "Tensor._version": without("_version"),
    "Node._input_metadata": lambda patch: patch.setattr(lean_activations, "OF_A_NODE", ("_input_metadata_", )),
    "Function._backward_cls": lambda patch: patch.setattr(lean_activations, "OF_A_FUNCTION", ("_backward_cls_",)),
    "ToCopyBackward0": lambda patch: patch.setattr(lean_activations, "CAST", "ToCopyBackward7"),
    "Tensor._post_accumulate_grad_hooks": without("_post_accumulate_grad_hooks"),
}  # fmt: skip


def stepped(model: Path, out: Path) -> tuple[Policy, torch.Tensor]:
    """A policy after an optimizer step, and the gradient that it stepped by."""
    policy = make_policy(model)
    gradient, step = [], policy.step

    def watched(learning_rate: float) -> None:
        gradient.extend(p.grad.flatten() for p in policy.model.parameters())
        step(learning_rate)

    policy.step = watched  # type: ignore[method-assign]
    rollout, training = {"temperature": 0.9, "max_completion_length": 40}, {"micro_batch_tokens": 200}
    run = make_run(policy, out, rollout=rollout, training=training, optimizer={"max_grad_norm": 0.0})
    optimizer_step(run, sequences(), 1e-3)
    return policy, torch.cat(gradient)


def has(policy: Policy, module: Any) -> bool:
    """Whether a part replaced the forward pass of some module."""
    forwards = [vars(m)["forward"] for m in policy.causal_lm.modules() if "forward" in vars(m)]
    return any(forward.__func__.__module__ == module.__name__ for forward in forwards)


@pytest.mark.parametrize("name", GONE)
def test_without_a_private_name_of_torch_training_goes_on(
    tiny_model: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    policy, expected = stepped(tiny_model, tmp_path)
    assert has(policy, lean_activations)
    assert has(policy, grads_in_place)
    assert "left out" not in caplog.text
    part, other = lean_activations, grads_in_place
    if name == "Tensor._post_accumulate_grad_hooks":
        part, other = other, part
    with pytest.MonkeyPatch.context() as patch:
        GONE[name](patch)
        policy, gradient = stepped(tiny_model, tmp_path)
    assert not has(policy, part)
    assert has(policy, other)
    lines = [line for line in caplog.messages if "left out" in line]
    assert len(lines) == 1
    assert name.rstrip("0") in lines[0]
    assert float((gradient - expected).norm()) < 2e-6 * float(expected.norm())


def test_the_other_hooks_name_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a training step: torch itself reads it there."""
    assert grads_in_place.missing() is None
    without("_backward_hooks")(monkeypatch)
    assert grads_in_place.missing() == "Tensor._backward_hooks"


@pytest.mark.parametrize("name", packed_attention.FLASH)
def test_without_torchs_flash_kernels_an_accelerator_gets_padded_rows(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    causal_lm = make_policy(tiny_model, model={"attn_implementation": "eager"}).causal_lm
    causal_lm.set_attn_implementation("sdpa")
    there = {n: None for n in packed_attention.FLASH if n != name}
    monkeypatch.setattr(packed_attention, "aten", SimpleNamespace(**there))
    why = kernels.install(causal_lm, torch.device("cuda"), trains=True, alone=True)
    assert why == f"this torch has no torch.ops.aten.{name}"
    assert causal_lm.config._attn_implementation == "sdpa"


def test_without_a_compiler_a_cpu_gets_padded_rows_and_the_same_gradient(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    _, expected = stepped(tiny_model, tmp_path)
    caplog.clear()
    monkeypatch.setenv("CXX", "none")
    caches = (native.library, packed_attention_compiled.library)
    try:
        for cached in caches:
            cached.cache_clear()
        policy, gradient = stepped(tiny_model, tmp_path)
    finally:
        for cached in caches:
            cached.cache_clear()
    assert not policy.packed
    assert "padded rows, which are slower" in caplog.text
    assert "there is no C++ compiler here (none)" in caplog.text
    assert float((gradient - expected).norm()) < 2e-6 * float(expected.norm())


def test_only_our_model_has_our_attention(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    policy = make_policy(tiny_model, needs_reference=True)
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert other.config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers.")
    if policy.packed:
        assert policy.causal_lm.config._attn_implementation == "grpo_packed"
        assert policy.reference.causal_lm.config._attn_implementation == "grpo_packed"
    policy.save_pretrained(tmp_path)
    assert "grpo_packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
