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
from grpo.model import compact_adamw
from grpo.model import policy as policy_module
from grpo.model.compact_adamw import joined
from grpo.model.optimizer import learning_rate, make_optimizer
from grpo.model.policy import Policy
from tests.conftest import make_policy
from tests.launching import ROOT, run_python

COMPACT = [
    {"optim": "adamw_8bit"},
    {"optim": "paged_adamw_8bit"},
    {"offload": True},
    {"optim": "adamw_8bit", "offload": True},
]
IN_BFLOAT16 = [{}, {"optim": "adamw_8bit"}, {"optim": "adamw_8bit", "offload": True}]


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Rows of 256 elements, a block of 8-bit moments, and of 300, which is not one."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 300), torch.nn.Linear(300, 64)).to(dtype)


def descend(trained: torch.nn.Module, steps: int = 30, **keys: Any) -> tuple[float, torch.optim.Optimizer]:
    """The loss of a regression after some steps."""
    optimizer = make_optimizer(trained, OptimizerConfig(learning_rate=1e-3, **keys))
    generator = torch.Generator().manual_seed(1)
    dtype = next(trained.parameters()).dtype
    x, y = (torch.randn(64, n, generator=generator).to(dtype) for n in (256, 64))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((trained(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach()), optimizer


def step_by(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """A step by random gradients, which are numbers of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.randn(parameter.shape, generator=generator).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def bytes_of(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors if torch.is_tensor(t))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(bytes_of(state.values()) for state in optimizer.state.values())


@pytest.mark.parametrize("keys", [keys for keys in COMPACT if "optim" in keys])
def test_eight_bits_learn_as_32_do_in_a_third_of_the_memory(keys: dict[str, Any]) -> None:
    plain, plain_optimizer = descend(model())
    small, small_optimizer = descend(model(), **keys)
    assert small == pytest.approx(plain, rel=0.05)
    assert state_bytes(small_optimizer) < 0.35 * state_bytes(plain_optimizer)


def test_blocks_of_a_row_step_as_bitsandbytes_does() -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = (torch.nn.Linear(512, 40, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = (
        make_optimizer(ours, OptimizerConfig(optim="adamw_8bit", learning_rate=1e-3)),
        AdamW8bit([{"params": list(theirs.parameters())}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    )
    for seed in range(4):
        for optimizer in optimizers:
            step_by(optimizer, seed)
    assert torch.equal(ours.weight, theirs.weight)


def test_bfloat16_weights_and_what_is_kept_beside_them_are_float32_ones_to_the_bit() -> None:
    """At a learning rate a hundred times below the last bit of most weights, where plain bfloat16 would stand still."""
    start = model(torch.bfloat16)
    whole, small, rounded = model(torch.bfloat16).float(), start, model(torch.bfloat16)
    config = OptimizerConfig(learning_rate=1e-6, weight_decay=0.1)
    by_float32, by_bfloat16 = make_optimizer(whole, config), make_optimizer(small, config)
    by_rounding = torch.optim.AdamW(rounded.parameters(), lr=1e-6)
    before = [p.detach().clone() for p in rounded.parameters()]
    for seed in range(20):
        for optimizer in (by_float32, by_bfloat16, by_rounding):
            step_by(optimizer, seed)
    for expected, weight in zip(whole.parameters(), small.parameters(), strict=True):
        rows = weight.detach().view(weight.shape[0], -1)
        assert torch.equal(joined(rows, by_bfloat16.state[weight]["low"]).view_as(weight), expected)
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), expected, rtol=2**-8, atol=0)
    moved = sum(int((p != was).sum()) for p, was in zip(rounded.parameters(), before, strict=True))
    assert moved < 0.05 * sum(p.numel() for p in before)


@pytest.mark.parametrize("keys", IN_BFLOAT16)
def test_bfloat16_weights_learn(keys: dict[str, Any]) -> None:
    plain, _ = descend(model())
    small, optimizer = descend(model(torch.bfloat16), **keys)
    assert small == pytest.approx(plain, rel=0.15)  # their gradients and passes are in bfloat16
    a_weight = state_bytes(optimizer) / sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert a_weight < (4.8 if keys else 10.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_neither_pieces_nor_offloading_change_a_number(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, optim: str
) -> None:
    at_once, _ = descend(trained := model(dtype), steps=5, optim=optim)
    monkeypatch.setattr(compact_adamw, "PIECE", 1000)
    in_pieces, _ = descend(other := model(dtype), steps=5, optim=optim, offload=True)
    assert at_once == in_pieces
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "keys"), [("float32", keys) for keys in COMPACT] + [("bfloat16", keys) for keys in IN_BFLOAT16]
)
def test_a_restored_state_goes_on_as_the_saved_one(tiny_model: Path, dtype: str, keys: dict[str, Any]) -> None:
    def policy() -> Policy:
        return make_policy(tiny_model, dtype=dtype, model={"weights": dtype}, optimizer=keys)

    def step(policy: Policy, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        policy.step(1e-6)

    one = policy()
    step(one, 0)
    file = io.BytesIO()
    torch.save(one.optimizer_state(), file)
    file.seek(0)
    other = policy()
    other.load_trained_state({name: t.clone() for name, t in one.trained_state().items()})
    other.load_optimizer_state(torch.load(file, weights_only=True))
    for seed in range(1, 4):
        step(one, seed)
        step(other, seed)
    for name, tensor in one.trained_state().items():
        assert torch.equal(other.trained_state()[name], tensor), name
    for a, b in zip(one.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


def test_the_8_bit_state_of_earlier_versions_is_taken_over() -> None:
    """It was bitsandbytes' own. Where its blocks end with rows the run goes on to the bit, elsewhere nearly."""
    from bitsandbytes.optim import AdamW8bit

    old, new = model(), model()
    theirs = AdamW8bit(
        [{"params": [p for p in old.parameters() if p.ndim == d]} for d in (2, 1)], lr=1e-3, weight_decay=0.0
    )
    ours = make_optimizer(new, OptimizerConfig(optim="adamw_8bit", learning_rate=1e-3))
    step_by(theirs, 0)
    new.load_state_dict(old.state_dict())
    ours.load_state_dict(theirs.state_dict())
    before = new[1].weight.detach().clone()
    step_by(theirs, 1)
    step_by(ours, 1)
    assert torch.equal(new[0].weight, old[0].weight)
    torch.testing.assert_close(new[0].bias, old[0].bias, rtol=0, atol=1e-7)  # too small for 8 bits: torch steps it
    difference = (new[1].weight - old[1].weight).norm() / (old[1].weight - before).norm()
    assert 0 < float(difference) < 0.05


def test_a_state_of_another_form_is_refused_by_name() -> None:
    plain, small = (make_optimizer(model(), OptimizerConfig(optim=o)) for o in ("adamw_torch", "adamw_8bit"))
    step_by(plain, 0)
    with pytest.raises(ValueError, match=r"exp_avg.*codes1.*optimizer.optim"):
        small.load_state_dict(plain.state_dict())


def test_what_can_not_be_stepped_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"paged_adamw_8bit can't step.*optimizer.offload"):
        make_optimizer(model(), OptimizerConfig(optim="paged_adamw_8bit"), sharded=True)
    monkeypatch.setattr(policy_module, "compute_dtype", lambda *_: torch.float32)
    with pytest.raises(UserError, match=r"bfloat16 needs the compute type bfloat16"):
        make_policy(tiny_model, dtype="auto", model={"weights": "bfloat16"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes.*pip install"):
        make_optimizer(model(), OptimizerConfig(optim="adamw_8bit"))


def test_the_norm_of_bfloat16_gradients_is_not_rounded(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, dtype="bfloat16", model={"weights": "bfloat16"})
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
    expected = torch.cat([p.grad.float().flatten() for p in policy.model.parameters()])
    assert policy.clip_gradients() == pytest.approx(float(expected.norm()), rel=1e-4)
    clipped = torch.cat([p.grad.float().flatten() for p in policy.model.parameters()])
    assert float(clipped.norm()) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.slow
def test_shards_of_two_processes_step_as_the_whole_and_their_state_loads_in_either(tmp_path: Path) -> None:
    done = run_python(ROOT / "tests/model/sharded_adamw.py", tmp_path / "rendezvous", timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same"] * 2


def test_learning_rates() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimizerConfig(learning_rate=1.0, lr_scheduler_type="linear", lr_min_ratio=0.1)
    assert [learning_rate(linear, step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    cosine = OptimizerConfig(learning_rate=2.0, lr_scheduler_type="cosine", warmup_steps=10)
    assert [learning_rate(cosine, step, 110) for step in (10, 60, 110)] == pytest.approx([2.0, 1.0, 0.0])
