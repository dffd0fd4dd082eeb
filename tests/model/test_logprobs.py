"""Chunked log-probabilities equal the plain ones, and their memory does not grow with tokens x vocabulary."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from grpo.backends.hf.draw import sample
from grpo.model import devices, logprobs
from grpo.model.truncation import Truncation


@pytest.mark.parametrize(("chunk", "tile", "kept"), [(1, 1, 0), (7, 3, 14), (7, 100, 10), (1000, 4, 0), (1000, 9, 50)])
def test_value_entropy_and_gradient_equal_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, chunk: int, tile: int, kept: int
) -> None:
    """Rows in a chunk, in a tile, and kept for the backward pass."""
    monkeypatch.setitem(devices.LOGITS, "cpu", devices.LogitSizes(chunk * 50, tile * 50, kept * 50))
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50).double()
    hidden_NH = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    targets_N = torch.randint(50, (23,))
    weights_N = torch.randn(23)

    logps_N, entropy_N, *_ = logprobs.token_statistics(
        hidden_NH, targets_N, head, vocab_size=50, temperature=0.7, parameters=head.parameters()
    )
    (logps_N * weights_N).sum().backward()
    ours = hidden_NH.grad.clone(), head.weight.grad.clone()
    hidden_NH.grad = head.weight.grad = None

    plain_NV = (head(hidden_NH).float() / 0.7).log_softmax(-1)
    (plain_NV.gather(1, targets_N[:, None])[:, 0] * weights_N).sum().backward()
    torch.testing.assert_close(logps_N, plain_NV.gather(1, targets_N[:, None])[:, 0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropy_N, -(plain_NV.exp() * plain_NV).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0], hidden_NH.grad, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(ours[1], head.weight.grad, atol=1e-6, rtol=1e-5)
    assert not entropy_N.requires_grad


@pytest.mark.parametrize(("chunk", "tile", "kept"), [(1, 1, 0), (7, 3, 14), (1000, 9, 50)])
def test_entropy_gradient_equals_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, chunk: int, tile: int, kept: int
) -> None:
    monkeypatch.setitem(devices.LOGITS, "cpu", devices.LogitSizes(chunk * 50, tile * 50, kept * 50))
    torch.manual_seed(1)
    head = torch.nn.Linear(16, 50)
    hidden_NH = torch.randn(23, 16, requires_grad=True)
    targets_N, weights_N, other_N = torch.randint(50, (23,)), torch.randn(23), torch.randn(23)

    logps_N, entropy_N, log_left_N, divergence_N = logprobs.token_statistics(
        hidden_NH, targets_N, head, vocab_size=50, temperature=0.7, parameters=head.parameters(), entropy_gradient=True
    )
    (logps_N @ weights_N + entropy_N @ other_N).backward()
    ours = hidden_NH.grad.clone(), head.weight.grad.clone()
    hidden_NH.grad = head.weight.grad = None

    plain_NV = (head(hidden_NH) / 0.7).log_softmax(-1)
    plain_entropy_N = -(plain_NV.exp() * plain_NV).sum(-1)
    (plain_NV.gather(1, targets_N[:, None])[:, 0] @ weights_N + plain_entropy_N @ other_N).backward()
    torch.testing.assert_close(ours[0], hidden_NH.grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1], head.weight.grad, atol=1e-5, rtol=1e-5)
    assert not log_left_N.any()
    assert not divergence_N.any()
    assert not divergence_N.requires_grad


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [(5, 1.0, None), (0, 0.8, None), (0, 1.0, 0.1), (20, 0.9, 0.02)])
def test_what_truncation_leaves_is_what_the_sampler_renormalized_by(
    top_k: int, top_p: float, min_p: float | None
) -> None:
    """The sampler's own log-probabilities are the trainer's less it."""
    torch.manual_seed(2)
    head = torch.nn.Linear(16, 50)
    hidden_NH = 3 * torch.randn(200, 16)
    truncation = Truncation(top_k, top_p, min_p)
    with torch.no_grad():
        tokens_N, sampler_N = sample(
            head(hidden_NH), torch.rand(200, dtype=torch.float64), temperature=0.8, **truncation._asdict()
        )
        logps_N, _, log_left_N, _ = logprobs.token_statistics(
            hidden_NH, tokens_N, head, vocab_size=50, temperature=0.8, truncation=truncation
        )
    torch.testing.assert_close(sampler_N + log_left_N, logps_N, atol=1e-5, rtol=1e-5)
    assert (log_left_N < -0.01).any()


PEAK = """
import resource, sys, torch
from grpo.model import devices, logprobs
N, V, H = int(sys.argv[1]), 40_000, 32
head = torch.nn.Linear(H, V, bias=False)
hidden = torch.randn(N, H, requires_grad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
logprobs.token_statistics(hidden, torch.zeros(N, dtype=torch.long), head, vocab_size=V, parameters=head.parameters())[
    0
].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def peak_mb(tokens: int) -> float:
    """Growth of a fresh process's peak memory over one forward and backward, in MB."""
    command = [sys.executable, "-c", PEAK, str(tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    """3,000 more tokens of 40,000 words would be 458 MB of logits in float32, and as much again for their gradient."""
    few, many = peak_mb(1_000), peak_mb(4_000)
    assert many - few < 200, f"{few:.0f} MB at 1,000 tokens, {many:.0f} MB at 4,000"
