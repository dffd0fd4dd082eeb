"""The size of micro-batches: found from memory, halved where memory runs out, the same after a resume."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.errors import RunError
from grpo.model import devices
from grpo.model.policy import Policy
from grpo.packing import packed_tokens
from grpo.run.run import Run
from grpo.run.state import Progress, restore_state, save_state
from grpo.types import Batch, TrainedSequence
from grpo.update import micro_batch_size
from grpo.update.forward import precompute_logprobs
from grpo.update.micro_batch_size import automatic_size, is_out_of_memory, kept_per_token
from grpo.update.step import optimizer_step
from tests.conftest import make_policy, make_recipe, make_run
from tests.gradient_of_step import sequences

CPU = "[enforce fail at alloc_cpu.cpp:129] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class RunsOut(torch.autograd.Function):
    """Raises in the backward pass, as the allocator does."""

    @staticmethod
    def forward(ctx, logps_BT, error):
        ctx.error = error
        return logps_BT.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def holding(policy: Policy, tokens: int, error: Exception) -> Policy:
    """The policy on a machine whose memory holds the backward pass of ``tokens`` tokens."""
    statistics = policy.statistics

    def limited(batch: Batch, temperature: float, **options: bool) -> tuple[torch.Tensor, ...]:
        logps_BT, *others = statistics(batch, temperature, **options)
        return (RunsOut.apply(logps_BT, error) if batch.input_ids_RN.numel() > tokens else logps_BT), *others

    policy.statistics = limited  # type: ignore[method-assign]
    return policy


def step(run: Run, batch: list[TrainedSequence] | None = None) -> tuple[dict, list]:
    """Metrics of an optimizer step, and the gradient that it steps by."""
    gradients: list[torch.Tensor] = []
    parameters = list(run.policy.model.parameters())
    run.policy.step = lambda _: gradients.extend(p.grad.clone() for p in parameters)  # type: ignore[method-assign]
    return optimizer_step(run, batch or sequences(), 1.0), gradients


def run_of(policy: Policy, folder: Path = Path("unused"), **training: int) -> Run:
    rollout = {"temperature": 0.9, "max_completion_length": 40}
    return make_run(policy, folder, training=training, optimizer={"max_grad_norm": 0.0}, rollout=rollout)


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU)])
def test_a_step_that_does_not_fit_is_done_again_in_halves_with_the_same_gradient(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    caplog.set_level(logging.WARNING)
    expected, whole = step(run_of(make_policy(tiny_model), tmp_path, micro_batch_tokens=1000))
    run = run_of(holding(make_policy(tiny_model), 50, error), tmp_path, micro_batch_tokens=1000)
    found, halved = step(run)
    assert run.progress.micro_batch_limit is not None
    assert run.progress.micro_batch_limit <= 50
    assert "out of memory in a micro-batch of" in caplog.text
    assert f"training.micro_batch_tokens={run.progress.micro_batch_limit}" in caplog.text
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for a, b in zip(whole, halved, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(a.norm()) + 1e-12
    caplog.clear()
    step(run)  # and the next one knows
    assert not caplog.text


@pytest.mark.slow
def test_a_single_sequence_that_does_not_fit_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    policy = holding(make_policy(tiny_model), 20, RuntimeError(CPU))
    with pytest.raises(RunError, match=r"a single sequence does not fit.*gradient_checkpointing"):
        step(run_of(policy, tmp_path))


def test_other_errors_are_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    policy = holding(make_policy(tiny_model), 20, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        step(run_of(policy, tmp_path))
    assert is_out_of_memory(MemoryError())


@pytest.mark.slow
def test_log_probabilities_that_do_not_fit_are_computed_again_in_halves(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(tiny_model)
    run = run_of(policy, micro_batch_tokens=1000)
    expected = precompute_logprobs(run, sequences(), reference=False)
    statistics = policy.statistics

    def limited(batch: Batch, temperature: float) -> tuple[torch.Tensor, ...]:
        if batch.input_ids_RN.numel() > 60:
            raise RuntimeError(CPU)
        return statistics(batch, temperature)

    monkeypatch.setattr(policy, "statistics", limited)
    found = precompute_logprobs(run, sequences(), reference=False)
    for a, b in zip(found, expected, strict=True):
        assert a.old_logprobs == pytest.approx(b.old_logprobs, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_token_keeps_is_what_the_forward_pass_of_more_of_them_keeps(
    tiny_model: Path, checkpointing: bool
) -> None:
    policy = make_policy(tiny_model, model={"gradient_checkpointing": checkpointing})
    config = policy.causal_lm.config
    width = 4 * config.hidden_size  # bytes
    inputs = width * config.num_hidden_layers
    kept = kept_per_token(policy)
    assert (inputs <= kept < 3 * inputs) if checkpointing else (10 * inputs < kept < 60 * inputs)


def test_it_is_measured_in_as_many_rows_as_the_models_positions_need(tiny_model: Path) -> None:
    """A model with a table of positions has none beyond them."""
    shape = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": 1}
    found = []
    for positions in (1024, 100):
        config = AutoConfig.for_model("gpt2", n_positions=positions, **shape)
        policy = make_policy(tiny_model, causal_lm=AutoModelForCausalLM.from_config(config))
        found.append(kept_per_token(policy))
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_the_automatic_size_is_a_share_of_free_memory(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    policy = make_policy(tiny_model)
    kept = kept_per_token(policy)
    largest, smallest = devices.LARGEST["cpu"][0], micro_batch_size.SMALLEST
    for tokens, size in ((1200, 1024), (1000, 512), (500, smallest), (10, smallest), (1e9, largest)):
        free = kept * tokens / micro_batch_size.SHARE + micro_batch_size._still_to_come(policy)
        monkeypatch.setattr(micro_batch_size, "free_memory", lambda _, free=free: free)
        assert automatic_size(policy) == size
        assert f"training.micro_batch_tokens: {size}" in caplog.text
    monkeypatch.setitem(devices.LARGEST, "cpu", (largest, kept * 1100))  # of a larger model a token keeps more
    assert automatic_size(policy) == 1024


def test_a_resumed_run_takes_the_size_that_the_checkpoint_s_run_had(tiny_model: Path, tmp_path: Path) -> None:
    policy, recipe = make_policy(tiny_model), make_recipe(tiny_model, training={"output_dir": str(tmp_path)})
    save_state(tmp_path, recipe, policy, Progress(step=3, micro_batch_limit=96))
    checkpoint = tmp_path / "checkpoints/step_000003"
    assert restore_state(checkpoint, recipe, make_policy(tiny_model)).micro_batch_limit == 96
    recipe = make_recipe(tiny_model, training={"output_dir": str(tmp_path), "micro_batch_tokens": 500})
    other = restore_state(checkpoint, recipe, make_policy(tiny_model))  # a recipe that asks for another size gets it
    assert other.micro_batch_limit is None


REALLY = """
import logging, resource, sys
from pathlib import Path
from tests.conftest import make_policy, make_recipe, make_run
from grpo.kernels import prepare_process
from grpo.types import TrainedSequence
from tests.update.test_micro_batch_size import run_of, step
logging.basicConfig(level=logging.WARNING)
prepare_process()
policy = make_policy(Path(sys.argv[1]))
ids = [[7 + i * (g + 1) % 90 for i in range(300)] for g in range(16)]
batch = [TrainedSequence([1, 2, 3], row, [-5.0] * 300, (-1.0) ** g) for g, row in enumerate(ids)]
if sys.argv[2] != "all":
    step(run_of(policy, Path("."), micro_batch_tokens=500), batch)  # threads and buffers
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
run = run_of(policy, Path("."), micro_batch_tokens=20_000)
metrics, _ = step(run, batch)
print(metrics["grad_norm"], run.progress.micro_batch_limit)
"""


def run_really(model: Path, megabytes: str) -> tuple[str, str, str]:
    done = subprocess.run([sys.executable, "-c", REALLY, str(model), megabytes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (*done.stdout.split(), done.stderr)


@pytest.mark.slow
def test_memory_that_really_runs_out(tiny_model: Path) -> None:
    """By a limit on the process's address space."""
    norm, limit, said = run_really(tiny_model, "all")
    assert (limit, said.count("out of memory")) == ("None", 0)
    less, limit, said = run_really(tiny_model, "40")
    assert int(limit) < 20_000
    assert "out of memory in a micro-batch of" in said
    assert float(less) == pytest.approx(float(norm), rel=1e-4)


def test_the_sizes_of_made_up_steps_are_what_these_tests_think() -> None:
    assert 100 < packed_tokens(sequences()) < 1000
