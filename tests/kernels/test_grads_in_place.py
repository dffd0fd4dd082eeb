"""Layers that add their weight's gradient themselves, beside autograd's sums of the same micro-batches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.checkpoint import checkpoint

from grpo.backends.hf.few_row_linear import packed_linears
from grpo.kernels import grads_in_place
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

V, H = 5000, 24  # more words than a block


class Tied(nn.Module):
    """Ids to logits: the head's weight is the embedding's, the linear layer in between has a bias."""

    def __init__(self, padding_idx: int | None = None):
        super().__init__()
        self.embedding = nn.Embedding(V, H, padding_idx=padding_idx)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.embedding(ids_BT))))


def pair(**kwargs: int) -> tuple[Tied, Tied]:
    torch.manual_seed(0)
    plain = Tied(**kwargs)
    ours = copy.deepcopy(plain)
    ours.head.weight = ours.embedding.weight
    grads_in_place.install(ours)
    return plain, ours


def micro_batches() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (2, tokens), generator=draw) for tokens in (7, 1, 30)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(ours: nn.Module, plain: nn.Module, rtol: float = 1e-5) -> None:
    found, expected = gradients(ours), gradients(plain)
    for name, grad in expected.items():
        assert (grad is None) == (found[name] is None), name
        if grad is not None:
            assert found[name].dtype == grad.dtype
            assert torch.linalg.norm(found[name] - grad) <= rtol * torch.linalg.norm(grad), name


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_several_micro_batches(dtype: torch.dtype, padding_idx: int | None) -> None:
    plain, ours = pair(padding_idx=padding_idx)
    for ids_BT in micro_batches():
        ids_BT[0, 0] = 3
        for model in (plain, ours):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits_BTV = model(ids_BT)
            assert logits_BTV.dtype == dtype
            logits_BTV.float().square().mean().backward()
    # In bfloat16 autograd adds the head's and the embedding's before either joins the sum.
    assert_same_gradients(ours, plain, 1e-5 if dtype == torch.float32 else 1e-2)


def test_outputs_are_the_same_numbers() -> None:
    plain, ours = pair()
    (ids_BT, *_) = micro_batches()
    assert torch.equal(ours(ids_BT), plain(ids_BT))
    with torch.no_grad():
        assert torch.equal(ours(ids_BT), plain(ids_BT))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(ids_BT), plain(ids_BT))


def test_in_bfloat16_with_and_without_gradients_the_same_numbers() -> None:
    """One pass gives the old log-probabilities, the other those that learn: their ratio must begin at 1."""
    _, ours = pair()
    (ids_BT, *_) = micro_batches()
    with torch.autocast("cpu", torch.bfloat16):
        learning_BTV = ours(ids_BT)
        with torch.no_grad():
            assert torch.equal(ours(ids_BT), learning_BTV)
    assert learning_BTV.dtype == torch.bfloat16


def test_a_weight_that_was_cast_is_cast_again_when_it_changed() -> None:
    """The last cast is kept, for the chunks of a head."""
    _, ours = pair()
    x_NH = torch.ones(2, H)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        before_NV = ours.head(x_NH)
        kept = grads_in_place._last
        assert torch.equal(ours.head(x_NH), before_NV)
        assert grads_in_place._last is kept
        ours.head.weight.mul_(2)
        assert torch.equal(ours.head(x_NH), 2 * before_NV)


def test_a_cuda_graph_neither_uses_nor_leaves_a_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from before may be freed before a replay; a replay overwrites one that was made in the capture."""
    _, ours = pair()
    x_NH = torch.ones(2, H)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected_NV = ours.head(x_NH)
        before = grads_in_place._last
        with monkeypatch.context() as patch:
            patch.setattr(grads_in_place, "_capturing", lambda _: True)
            ours.head.weight.data.mul_(2)  # not counted: the cast from before still looks right
            assert torch.equal(ours.head(x_NH), 2 * expected_NV)
            ours.layer(x_NH)
        assert grads_in_place._last is before


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_step_of_the_optimizer_is_seen(tiny_model: Path, optim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused optimizers write without autograd's counting. The backward pass casts the first layer's weight last, and
    the next forward pass begins with it."""
    if optim == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    policy = make_policy(tiny_model, dtype="bfloat16", optimizer={"optim": optim})
    batch = policy.collate(sequences()[:2])
    for _ in range(2):
        policy.logprobs(batch, 1.0)[0].sum().backward()
        policy.step(0.1)
        kept = policy.logprobs(batch, 1.0)[0]
        monkeypatch.setattr(grads_in_place, "_last", None)
        assert torch.equal(policy.logprobs(batch, 1.0)[0], kept)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_of_adapters_with_and_without_gradients_the_same_numbers(tiny_model: Path) -> None:
    policy = make_policy(tiny_model, dtype="bfloat16", model={"lora": {"r": 4, "target_modules": "all-linear"}})
    batch = policy.collate(sequences()[:2])
    learning = policy.logprobs(batch, 1.0)[0]
    learning.sum().backward()
    with torch.no_grad():
        assert torch.equal(policy.logprobs(batch, 1.0)[0], learning)
    frozen = [p for p in policy.causal_lm.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.grad is None for p in frozen)
    assert any(p.grad is not None and p.grad.any() for p in policy.causal_lm.parameters())
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("frozen", ["embedding.weight", "layer.weight", "layer.bias"])
def test_what_is_frozen_gets_none(frozen: str) -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.get_parameter(frozen).requires_grad_(False)
        for ids_BT in micro_batches():
            model(ids_BT).square().mean().backward()
    assert ours.get_parameter(frozen).grad is None
    assert_same_gradients(ours, plain)


def test_checkpointing_makes_them_once() -> None:
    plain, ours = pair()
    for ids_BT in micro_batches():
        plain(ids_BT).square().mean().backward()
        checkpoint(ours, ids_BT, use_reentrant=False).square().mean().backward()
    assert_same_gradients(ours, plain)


def test_whoever_listens_to_a_gradient_gets_it() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.embedding.weight.register_hook(lambda grad: 2 * grad)
        model(micro_batches()[0]).square().mean().backward()
    assert_same_gradients(ours, plain)


def test_a_rollout_between_two_updates_leaves_it_as_it_was() -> None:
    """Decoding through transformers gives linear layers another forward for its time."""
    plain, ours = pair()
    for ids_BT in micro_batches():
        plain(ids_BT).square().mean().backward()
        with packed_linears(ours), torch.no_grad():
            assert torch.allclose(ours(ids_BT), plain(ids_BT), atol=1e-5)
        assert vars(ours.head)["forward"].__func__ is grads_in_place._linear_forward
        ours(ids_BT).square().mean().backward()
    with packed_linears(plain):
        pass
    assert "forward" not in vars(plain.head)
    assert_same_gradients(ours, plain)


def test_a_layer_of_someones_own_stays() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = Doubled(3, 3)
    grads_in_place.install(layer)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_policy_with_tied_weights(tiny_model: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def backward() -> nn.Module:
        policy = make_policy(tiny_model, dtype=dtype)
        head, embedding = policy.causal_lm.get_output_embeddings(), policy.causal_lm.get_input_embeddings()
        assert head.weight is embedding.weight
        for part in (sequences()[:2], sequences()[2:]):
            policy.logprobs(policy.collate(part), 1.0)[0].sum().backward()
        return policy.causal_lm

    ours = backward()
    assert "forward" in vars(ours.get_output_embeddings())
    monkeypatch.setattr(grads_in_place, "install", lambda model: None)
    assert_same_gradients(ours, backward(), 1e-5 if dtype == "float32" else 2e-2)
    AcceleratorState._reset_state(reset_partial_state=True)  # a bfloat16 one would stay for the next test
