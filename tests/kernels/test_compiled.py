"""What is compiled for the update on a CPU: norms, gated MLPs and packed attention, beside their definitions."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grpo.kernels import elementwise, native, packed_attention
from grpo.kernels import packed_attention_compiled as compiled_attention
from grpo.types import Layout
from tests.conftest import make_policy
from tests.gradient_of_step import sequences

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="no compiler")
LAYOUTS = {  # lengths of prompts, and of each one's completions
    "two groups": ([20, 33], [[5, 64, 1], [40, 100]]),
    "one token": ([1], [[1]]),
    "whole panels": ([32, 64], [[32, 96], [64]]),
    "several blocks": ([130], [[200, 49, 48, 47]]),
    "an empty completion": ([7, 9], [[3, 0], [0, 31, 33]]),
}


def forget() -> None:
    native.library.cache_clear()
    elementwise.library.cache_clear()
    compiled_attention.library.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def forgotten() -> Iterator[None]:
    forget()
    yield
    forget()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def layout_of(name: str) -> Layout:
    prompts, completions = LAYOUTS[name]
    segments, groups = [0], []
    for length in prompts:
        segments.append(segments[-1] + length)
    groups.append(segments[-1])
    for lengths in completions:
        for length in lengths:
            segments.append(segments[-1] + length)
        groups.append(segments[-1])
    unused = torch.empty(0)
    return Layout(segments, groups, unused, unused, unused)


def mask_of(layout: Layout) -> torch.Tensor:
    """True where a token (row) sees another (column)."""
    sees = torch.zeros((layout.segments[-1],) * 2, dtype=torch.bool)
    for start, end in pairwise(layout.segments):
        sees[start:end, start:end] = torch.ones((end - start,) * 2).tril().bool()
    for (start, end), (first, last) in zip(pairwise(layout.segments), pairwise(layout.groups), strict=False):
        sees[first:last, start:end] = True
    return sees


def with_gradients(function: Callable, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, and gradients of a sum in which every number has another weight."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    (out.float() * torch.arange(out.numel()).view_as(out).cos()).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other.double()).norm()) <= tolerance * float(other.double().norm())


@pytest.mark.parametrize("shape", [(1, 32), (7, 48), (3, 5, 576)])
def test_a_norm_is_its_definition(shape: tuple[int, ...]) -> None:
    x, weight, grad = torch.randn(shape) * 3, torch.randn(shape[-1]), torch.randn(shape)
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    expected = norm(x64, weight64)
    expected.backward(grad.double())
    compiled = elementwise.Norm(1e-5)
    found = [compiled(x, weight), *compiled.gradients(grad, x, weight)]
    assert_close(found, [expected.detach(), x64.grad, weight64.grad], 3e-7)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_a_gated_product_is_its_definition(size: int) -> None:
    gate, up, grad = (torch.randn(size) * 4 for _ in range(3))
    gate64, up64 = (t.double().requires_grad_() for t in (gate, up))
    expected = silu(gate64) * up64
    expected.backward(grad.double())
    compiled = elementwise.Gated()
    found = [compiled(gate, up), *compiled.gradients(grad, gate, up)]
    assert_close(found, [expected.detach(), gate64.grad, up64.grad], 1e-6)


def test_a_gated_product_in_bfloat16_rounds_where_torch_does() -> None:
    """The same bits but for a few: exp differs in its last places."""
    gate, up, grad = ((torch.randn(10_000) * 4).bfloat16() for _ in range(3))
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    expected = silu(leaves[0]) * leaves[1]
    expected.backward(grad)
    compiled = elementwise.Gated()
    found = [compiled(gate, up), *compiled.gradients(grad, gate, up)]
    for one, other in zip(found, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert float((one != other).float().mean()) < 0.01


def test_what_is_another_norm_or_product_is_left_to_torch() -> None:
    llama, gemma, layer_norm, odd = LlamaRMSNorm(64), Gemma2RMSNorm(64), nn.LayerNorm(64, bias=False), LlamaRMSNorm(20)
    assert elementwise.norm_of(llama, norm_like(llama)) is not None
    for other in (gemma, layer_norm, odd, LlamaRMSNorm(64).bfloat16()):
        assert elementwise.norm_of(other, norm_like(other)) is None
    cpu = torch.device("cpu")
    assert elementwise.gated_of(lambda gate, up: silu(gate) * up, cpu) is not None
    assert elementwise.gated_of(lambda gate, up: gelu(gate) * up, cpu) is None
    x = torch.randn(4, 64)
    compiled = elementwise.Norm(1e-6)
    assert compiled.takes(x, llama.weight)
    assert not compiled.takes(x.T, llama.weight)
    assert not compiled.takes(x.double(), llama.weight)
    assert not elementwise.Gated().takes(x, x.bfloat16())


def norm_like(module: nn.Module) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"weight": weight}, x)

    return forward


@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(9, 3, 64), (2, 2, 32), (4, 1, 128)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_attention_is_attention_under_the_mask(name: str, heads: int, kv_heads: int, D: int) -> None:
    layout = layout_of(name)
    q_NhD, k_NkD, v_NkD = (torch.randn(layout.segments[-1], n, D) for n in (heads, kv_heads, kv_heads))

    def dense(*qkv: torch.Tensor) -> torch.Tensor:
        by_head = (x.transpose(0, 1)[None] for x in qkv)
        return scaled_dot_product_attention(*by_head, mask_of(layout), enable_gqa=True)[0].transpose(0, 1)

    def packed(*qkv: torch.Tensor) -> torch.Tensor:
        return packed_attention._Attention.apply(*qkv, layout, None)

    assert compiled_attention.takes(q_NhD, k_NkD, v_NkD)
    found = with_gradients(packed, q_NhD, k_NkD, v_NkD)
    expected = with_gradients(dense, *(x.double() for x in (q_NhD, k_NkD, v_NkD)))
    if name == "one token":
        # Softmax over one or two keys: gradients of queries and keys are differences, or nought, of products of the
        # output's gradient with values (D numbers of size one), and right to those products' rounding.
        scale = float(expected[3].norm()) * D**0.5
        assert_close([found[0], found[3]], [expected[0], expected[3]], 2e-6)
        assert all(float((found[i] - expected[i]).norm()) < 2e-7 * scale for i in (1, 2))
    else:
        assert_close(found, expected, 2e-6)
    again = with_gradients(packed, q_NhD, k_NkD, v_NkD)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    # As the trainer hands them over: heads and tokens in the other order in memory.
    strided = with_gradients(
        lambda *qkv: packed(*(x.transpose(0, 1) for x in qkv)), *(x.transpose(0, 1) for x in (q_NhD, k_NkD, v_NkD))
    )
    for one, other in zip(strided[1:], found[1:], strict=True):
        assert torch.equal(one.transpose(0, 1), other)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_what_is_not_a_number_stays_that(which: int) -> None:
    layout = layout_of("whole panels")
    qkv = [torch.randn(layout.segments[-1], n, 64) for n in (2, 1, 1)]
    qkv[which][40] = torch.nan  # a token of the second prompt
    out_NhD = packed_attention._Attention.apply(*qkv, layout, None)
    sees_N = mask_of(layout)[:, 40] if which else torch.arange(len(out_NhD)) == 40
    assert out_NhD[sees_N].isnan().all()
    if which < 2:  # of values nan times 0 is nan, for tokens before it too
        assert not out_NhD[~sees_N].isnan().any()


def test_attention_in_bfloat16_is_as_near_as_it_allows() -> None:
    layout = layout_of("two groups")
    q_NhD, k_NkD, v_NkD = (torch.randn(layout.segments[-1], n, 64).bfloat16() for n in (9, 3, 3))

    def packed(*qkv: torch.Tensor) -> torch.Tensor:
        return packed_attention._Attention.apply(*qkv, layout, None)

    exact = with_gradients(packed, q_NhD.float(), k_NkD.float(), v_NkD.float())
    assert_close([x.float() for x in with_gradients(packed, q_NhD, k_NkD, v_NkD)], exact, 2**-8)


@pytest.mark.slow
@pytest.mark.usefixtures("forgotten")
def test_vectors_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU without AVX-512 compiles."""
    layout = layout_of("two groups")
    qkv = [torch.randn(layout.segments[-1], n, 64) for n in (4, 2, 2)]
    gate, up = torch.randn(2, 1001)

    def everything() -> list[torch.Tensor]:
        attention = with_gradients(lambda *x: packed_attention._Attention.apply(*x, layout, None), *qkv)
        weight = qkv[0][0, 0]
        norms = [
            elementwise.Norm(1e-5)(qkv[0], weight),
            *elementwise.Norm(1e-5).gradients(*qkv[:1] * 2, weight),
        ]
        return [*attention, *norms, elementwise.Gated()(gate, up), *elementwise.Gated().gradients(up, gate, up)]

    wide = everything()
    monkeypatch.setattr(native, "FLAGS", [flag.replace("native", "haswell") for flag in native.FLAGS])
    forget()
    assert elementwise.library().vector_floats() == 8
    assert_close(everything(), wide, 1e-6)


@pytest.mark.usefixtures("forgotten")
def test_without_a_compiler_the_gradient_is_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gradient() -> torch.Tensor:
        policy = make_policy(tiny_model)
        policy.logprobs(policy.collate(sequences()), 1.0)[0].sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.model.parameters()])

    compiled = gradient()
    monkeypatch.setenv("CXX", "none")
    forget()
    with caplog.at_level(logging.INFO, "grpo"):
        through_torch = gradient()
    assert "update: norms and gated MLPs through torch, slower: there is no C++ compiler here (none)" in caplog.text
    assert_close([compiled], [through_torch], 2e-6)
    assert not torch.equal(compiled, through_torch)
