"""Fused experts with LoRA, multimodal models and routers' biases, on one process, on two replicas and on two shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.launching import how_parts_ended
from tests.processes.odd_models import CASES

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("odd")


@pytest.fixture(scope="module")
def ended(root: Path) -> dict[str, list[int]]:
    """How the processes of each part of the script ended."""
    return how_parts_ended("odd_models.py", root)[0]


def test_every_part_ends_well(ended: dict[str, list[int]]) -> None:
    """What each part checks is in the script."""
    assert {part for part, statuses in ended.items() if any(statuses)} == set()
    assert len(ended) == 3 * (len(CASES) + 2) + 1


def test_loads_and_biases_are_those_of_one_process(ended: dict[str, list[int]], root: Path) -> None:
    expected, biases = torch.load(root / "ddp 1" / "balance 0.pt")
    assert any(float(bias.abs().max()) > 0 for bias in biases)
    for kind in ("ddp 2", "fsdp2 2"):
        for rank in (0, 1):
            metrics, moved = torch.load(root / kind / f"balance {rank}.pt")
            assert all(torch.equal(a, b) for a, b in zip(moved, biases, strict=True))
            for name, value in expected.items():
                exact = name.startswith("router/")
                assert metrics[name] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-5)), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does_and_write_it(case: str, ended: dict[str, list[int]], root: Path) -> None:
    one = torch.load(root / "ddp 1" / f"{case}.pt")
    for kind in ("ddp 2", "fsdp2 2"):
        two = torch.load(root / kind / f"{case}.pt")
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=1e-2, msg=lambda m, n=name: f"{n}: {m}")
        written = AutoModelForCausalLM.from_pretrained(root / kind / case).state_dict()
        assert all(torch.equal(written[name], tensor) for name, tensor in two.items())
