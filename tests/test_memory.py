"""Pages of one's own: a tensor as any other, whose memory goes back with it; and gradients that stand in them."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from grpo import memory
from grpo.memory import own_pages
from tests.conftest import make_policy
from tests.gradient_of_step import sequences


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (700, 1001)])
def test_it_is_a_tensor_of_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = own_pages(shape, dtype)
    assert torch.equal(found, torch.zeros(shape, dtype=dtype))
    assert torch.equal(found.fill_(3), torch.full(shape, 3, dtype=dtype))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_the_memory_goes_back_with_the_last_view() -> None:
    before = resident()
    view = own_pages((64 << 20,), torch.uint8).fill_(1)[1:]
    assert resident() - before > 60 << 20
    del view
    gc.collect()
    assert resident() - before < 10 << 20


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="can't allocate"):
        own_pages((1 << 60,), torch.uint8)


def test_gradients_stand_in_pages_of_their_own_and_are_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches: the second is added where the first one's is."""

    def gradients() -> list[torch.Tensor]:
        policy = make_policy(tiny_model)
        for part in (sequences()[:2], sequences()[2:]):
            policy.logprobs(policy.collate(part), 1.0)[0].sum().backward()
        return [p.grad for p in policy.model.parameters()]

    found = gradients()
    assert all(hasattr(grad, "has_own_pages") for grad in found)
    monkeypatch.setattr(torch.Tensor, "register_post_accumulate_grad_hook", lambda self, hook: None)
    plain = gradients()
    assert not any(hasattr(grad, "has_own_pages") for grad in plain)
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))
    assert sum(grad.nbytes for grad in found) > memory.LARGE
