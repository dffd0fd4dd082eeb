"""What is said of the machine before a run starts."""

from __future__ import annotations

import logging

import pytest
import torch

from grpo.run.session import _seconds_a_product, warn_of_slow_bfloat16


@pytest.mark.parametrize(("bfloat16", "said"), [(3.0, True), (0.8, False)])
def test_bfloat16_that_is_slower_than_float32_is_told(
    caplog: pytest.LogCaptureFixture, bfloat16: float, said: bool
) -> None:
    with caplog.at_level(logging.WARNING, logger="grpo"):
        warn_of_slow_bfloat16({torch.bfloat16: bfloat16, torch.float32: 1.0}.__getitem__)
    assert ("3.0 times as slowly" in caplog.text and "set model.dtype: float32" in caplog.text) == said


def test_a_product_is_timed() -> None:
    assert _seconds_a_product(torch.float32, 512) > _seconds_a_product(torch.float32, 16) > 0
