"""Logits in float32 from a model in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo import kernels
from grpo.errors import UserError
from tests.conftest import make_policy
from tests.gradient_of_step import sequences


@pytest.mark.parametrize("alone", [True, False], ids=["in place", "handed over"])
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["", "lora"])
def test_log_probabilities_are_nearer_to_float32s(
    tiny_model: Path, lora: dict | None, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same model: with the head's rounding and without. Gradients are those of the plain head to rounding."""
    install = kernels.install
    monkeypatch.setattr(kernels, "install", lambda *given, **named: install(*given, **named | {"alone": alone}))
    found = {}
    for wanted in ("none", ["float32_head"]):
        policy = make_policy(tiny_model, dtype="bfloat16", sharpen=3.0, model={"kernels": wanted, "lora": lora})
        hidden = []
        head = policy.causal_lm.get_output_embeddings()
        head.register_forward_hook(lambda _, given, made, hidden=hidden: hidden.append((given[0], made.clone())))
        logps_BT, _ = policy.logprobs(policy.collate(sequences()), 1.0)
        logps_BT.sum().backward()
        x, logits = hidden[0]
        exact = x.bfloat16().double() @ head.weight.detach().bfloat16().double().T
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        found[str(wanted)] = logits.dtype, float((logits.double() - exact).abs().max()), gradient
    (plain_dtype, plain_error, plain), (dtype, error, gradient) = found.values()
    assert (plain_dtype, dtype) == (torch.bfloat16, torch.float32)
    assert error < plain_error / 100
    assert float((gradient - plain).norm()) < 0.02 * float(plain.norm())


def test_float32_is_not_changed(tiny_model: Path) -> None:
    found = []
    for wanted in ("none", ["float32_head"]):
        policy = make_policy(tiny_model, model={"kernels": wanted})
        found.append(policy.logprobs(policy.collate(sequences()), 1.0)[0])
    assert torch.equal(*found)


def test_what_cannot_be_had_is_said(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"model\.kernels: liger can't be had: .* and this is a cpu"):
        make_policy(tiny_model, model={"kernels": ["liger"]})
