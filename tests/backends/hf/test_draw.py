"""One uniform number a token, inverted through the cumulative distribution."""

from __future__ import annotations

import pytest
import torch

from grpo.backends.hf.draw import sample, truncate


def logits(B: int = 4, V: int = 30, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(B, V, generator=torch.Generator().manual_seed(seed))


def test_frequencies_follow_the_distribution() -> None:
    n = 20_000
    logits_1V = logits(1, 6)
    uniforms_N = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly spread: an exact quadrature
    tokens_N, logps_N = sample(logits_1V.expand(n, -1), uniforms_N, temperature=0.8)
    expected_V = (logits_1V[0] / 0.8).softmax(-1)
    torch.testing.assert_close(torch.bincount(tokens_N, minlength=6) / n, expected_V, atol=2 / n, rtol=0)
    torch.testing.assert_close(logps_N, expected_V.log()[tokens_N])


@pytest.mark.parametrize(
    "options",
    [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8, "min_p": 0.1}, {"top_k": 1}],
    ids=str,
)
def test_truncation_agrees_with_transformers_and_is_renormalized(options: dict) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = logits() / 0.9
    expected_BV = logits_BV.clone()
    if "top_k" in options:
        expected_BV = TopKLogitsWarper(options["top_k"])(None, expected_BV)
    if "top_p" in options:
        expected_BV = TopPLogitsWarper(options["top_p"])(None, expected_BV)
    if "min_p" in options:
        expected_BV = MinPLogitsWarper(options["min_p"])(None, expected_BV)
    kept_BV = ~truncate(logits_BV, **options).isinf()
    assert (kept_BV == ~expected_BV.isinf()).all()

    n = 2000
    uniforms_N = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for row, expected_V in zip(logits(), expected_BV.softmax(-1), strict=True):
        tokens_N, logps_N = sample(row.expand(n, -1), uniforms_N, temperature=0.9, **options)
        torch.testing.assert_close(logps_N, expected_V.log()[tokens_N], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.bincount(tokens_N, minlength=30) / n, expected_V, atol=2 / n, rtol=0)


def test_extreme_uniforms_never_draw_an_impossible_token() -> None:
    """0 takes the first possible token, the largest uniform the last one: never a truncated neighbour."""
    logits_BV = torch.full((2, 10), -torch.inf)
    logits_BV[:, 3:7] = 0.0
    tokens_B, logps_B = sample(logits_BV, torch.tensor([0.0, 1 - 2.0**-32], dtype=torch.float64))
    assert tokens_B.tolist() == [3, 6]
    torch.testing.assert_close(logps_B, torch.full((2,), 0.25).log())


def test_temperature_zero_is_greedy() -> None:
    tokens_B, logps_B = sample(logits(), torch.rand(4, dtype=torch.float64), temperature=0)
    assert (tokens_B == logits().argmax(-1)).all()
    assert (logps_B == 0).all()
