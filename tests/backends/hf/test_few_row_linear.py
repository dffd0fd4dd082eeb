"""Packed weights: the same products, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from grpo.backends.hf import few_row_linear
from grpo.backends.hf.few_row_linear import packed_linears


@pytest.mark.parametrize("small", [0, few_row_linear.SMALL])
def test_packed_linears_give_the_same_products_and_leave_nothing_behind(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_row_linear, "SMALL", small)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 32, bias=False))
    for x in (torch.randn(3, 48), torch.randn(2, 70, 48)):
        with torch.no_grad():
            expected = model(x)
            with packed_linears(model):
                assert "forward" in vars(model[0])
                torch.testing.assert_close(model(x), expected)
    assert "forward" not in vars(model[0])


def test_bfloat16_weights_multiply_in_bfloat16() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(48, 96, dtype=torch.bfloat16), torch.randn(8, 48, dtype=torch.bfloat16)
    with torch.no_grad(), packed_linears(layer):
        found = layer(x)
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found, torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_a_weight_that_is_another_during_a_pass_is_the_one_that_counts() -> None:
    """peft adds to a router's weight so, where it takes ``gate`` of a mixture of experts for a parameter."""
    layer, x = torch.nn.Linear(48, 8, bias=False), torch.randn(3, 48)
    with torch.no_grad(), packed_linears(layer):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
        torch.testing.assert_close(layer(x), 2 * x @ layer.parametrizations.weight.original.T)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_weight_that_a_hook_makes_for_each_pass_is_not_packed() -> None:
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(48, 8))
    x = torch.randn(3, 48)
    with torch.no_grad():
        before = layer(x)
        layer.weight_g.mul_(2.0)  # an update
        with packed_linears(layer):
            found = layer(x)
        assert not torch.allclose(found, before)
        torch.testing.assert_close(found, layer(x))


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight
