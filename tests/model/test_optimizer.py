"""AdamW in its forms: what its state takes, that it steps like the plain one, that it resumes; learning rates."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import OptimizerConfig
from grpo.errors import UserError
from grpo.model.optimizer import learning_rate, make_optimizer
from tests.conftest import make_policy

EIGHT_BIT = ["adamw_8bit", "paged_adamw_8bit"]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 64))


def descend(trained: torch.nn.Module, optim: str, steps: int = 30) -> tuple[float, torch.optim.Optimizer]:
    """The loss of a regression after some steps."""
    optimizer = make_optimizer(trained, OptimizerConfig(optim=optim, learning_rate=1e-3))
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(64, n, generator=generator) for n in (256, 64))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((trained(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    return float(loss), optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_eight_bits_learn_as_32_do_in_a_third_of_the_memory(optim: str) -> None:
    plain, plain_optimizer = descend(model(), "adamw_torch")
    small, small_optimizer = descend(model(), optim)
    assert small == pytest.approx(plain, rel=0.05)
    assert state_bytes(small_optimizer) < 0.3 * state_bytes(plain_optimizer)


@pytest.mark.parametrize("optim", EIGHT_BIT)
def test_a_restored_state_goes_on_as_the_saved_one(tiny_model: Path, optim: str) -> None:
    def step(policy: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        policy.step(1e-3)

    one = make_policy(tiny_model, optimizer={"optim": optim})
    step(one, 0)
    file = io.BytesIO()
    torch.save(one.optimizer_state(), file)
    file.seek(0)
    other = make_policy(tiny_model, optimizer={"optim": optim})
    other.load_trained_state({name: t.clone() for name, t in one.trained_state().items()})
    other.load_optimizer_state(torch.load(file, weights_only=True))
    step(one, 1)
    step(other, 1)
    for name, tensor in one.trained_state().items():
        assert torch.equal(other.trained_state()[name], tensor), name


def test_without_bitsandbytes_and_with_several_processes_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OptimizerConfig(optim="adamw_8bit")
    with pytest.raises(UserError, match=r"adamw_8bit is for one process.*FSDP2"):
        make_optimizer(model(), config, several_processes=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*pip install"):
        make_optimizer(model(), config)


def test_learning_rates() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimizerConfig(learning_rate=1.0, lr_scheduler_type="linear", lr_min_ratio=0.1)
    assert [learning_rate(linear, step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    cosine = OptimizerConfig(learning_rate=2.0, lr_scheduler_type="cosine", warmup_steps=10)
    assert [learning_rate(cosine, step, 110) for step in (10, 60, 110)] == pytest.approx([2.0, 1.0, 0.0])
