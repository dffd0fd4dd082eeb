"""Whole runs on several processes beside the same runs on one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.test_train import SHORT
from tests.launching import DDP, FSDP2, launch, run_python
from tests.resuming import ALL_OF_IT, command, lines

pytestmark = pytest.mark.timeout(600)  # several launches each, on machines of any speed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [(DDP, ()), (FSDP2, ("model.lora.r=4", "algorithm.sync_ref_model=false"))],
    ids=["ddp", "fsdp2 with LoRA"],
)
def test_two_processes_make_the_same_run_as_one(
    tiny_model: Path, tmp_path: Path, kind: list[str], more: tuple[str, ...]
) -> None:
    """The same completions are sampled (keys do not know of processes), and the weights agree to rounding."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_python(*command(tiny_model, alone, *SHORT, *more)).returncode == 0
    done = launch(kind, *command(tiny_model, together, *SHORT, *more))
    assert done.returncode == 0, done.stderr
    for one, two in zip(lines(alone), lines(together), strict=True):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-5)
    one, two = (AutoModelForCausalLM.from_pretrained(f / "final").state_dict() for f in (alone, together))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_draw_the_same_prompts_as_one(tiny_model: Path, tmp_path: Path) -> None:
    """Rounds whose prompts do not divide by the processes among them; what is learned of prompts is the same too."""
    more = (*SHORT, *ALL_OF_IT, "training.max_steps=5", "optimizer.learning_rate=1e-5")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert run_python(*command(tiny_model, alone, *more)).returncode == 0
    done = launch(DDP, *command(tiny_model, together, *more))
    assert done.returncode == 0, done.stderr
    assert len(lines(alone)) == len(lines(together)) > 5
    for one, two in zip(lines(alone), lines(together), strict=True):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-5)
    drawn = [row["dynamic_sampling/groups_drawn"] for row in lines(together) if "reward" in row]
    assert any(number % 2 for number in drawn), "some round was of an odd number"
    names = ("extra_prompts", "pass_rates", "replay")
    held = [torch.load(f / "checkpoints/step_000005/progress.pt", weights_only=True) for f in (alone, together)]
    for completions in [group["completions"] for state in held for group in state["replay"]]:
        del completions["logprobs"]  # equal to rounding
        completions |= {name: completions[name].tolist() for name in ("token_ids", "lengths", "versions")}
    assert all(held[0][name] == held[1][name] for name in names)
    for step in range(1, 6):
        one, two = ((f / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines() for f in (alone, together))
        assert [json.loads(x)["completion"] for x in one] == [json.loads(x)["completion"] for x in two]


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_the_processes_is_refused_on_one_screen(
    tiny_model: Path, tmp_path: Path
) -> None:
    done = launch(DDP, *command(tiny_model, tmp_path / "run", "training.prompts_per_step=6"), processes=4)
    assert done.returncode != 0
    assert done.stderr.count("does not divide by the 4 processes") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_goes_to_nan_stops_on_both_processes(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = launch(DDP, *command(tiny_model, folder, *SHORT, "optimizer.learning_rate=1e38"))
    assert done.returncode != 0
    assert "nonfinite_rank_" in done.stderr
    assert {p.name for p in folder.glob("nonfinite_rank_*.pt")} == {"nonfinite_rank_0.pt", "nonfinite_rank_1.pt"}
