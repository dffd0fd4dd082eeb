"""The optimizer on a GPU, without numbers: the streams that offloaded state travels on."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from grpo.model.compact_adamw import CompactAdamW
from tests.fake_cuda.device import Watch


@pytest.mark.parametrize("eight_bit", [True, False])
def test_8_bit_pieces_travel_on_the_stream_that_bitsandbytes_computes_on(watch: Watch, eight_bit: bool) -> None:
    default, others = mock.Mock(), [mock.Mock(), mock.Mock()]
    streams = {
        "default_stream": mock.Mock(return_value=default),
        "current_stream": mock.Mock(),
        "Stream": mock.Mock(side_effect=others),
        "stream": mock.Mock(side_effect=lambda stream: stream),
    }
    weight = torch.nn.Parameter(torch.empty(64, 256, device="cuda"))
    keys = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = CompactAdamW([{"params": [weight]}], eight_bit=eight_bit, offload=True, **keys)
    with mock.patch.multiple("torch.cuda", **streams):
        assert optimizer._turns() == ([default] if eight_bit else others)
    for stream in optimizer.streams:
        stream.wait_stream.assert_called_once()  # gradients are there
