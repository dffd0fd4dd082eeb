"""A step with experts: their loads, loss and bias are those of the whole step, however it is split or begun again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from data.tiny import write_tiny_model
from grpo.config import AlgorithmConfig
from grpo.sft import train_step
from grpo.types import Example, TrainedSequence
from grpo.update import step as step_module
from grpo.update.experts import StepExperts
from grpo.update.micro_batch_size import DoesNotFit
from grpo.update.step import optimizer_step, with_signal
from tests.conftest import make_policy, make_recipe, make_run
from tests.gradient_of_step import TEMPERATURE, sequences

NAMES = {"router/max_load", "router/load_entropy", "router/dead_experts"}


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_moe")
    write_tiny_model(folder, arch="deepseek_v3")
    return folder


class Step:
    """One step on ``sequences()``: its metrics, its gradients before the optimizer takes them, the biases after it."""

    def __init__(self, model: Path, batch: list[TrainedSequence] | None = None, **settings: Any):
        training = {"micro_batch_size": settings.pop("micro_batch_size", None)}
        policy = make_policy(model, algorithm=settings)
        self.gradients: dict[str, torch.Tensor] = {}
        take = policy.step

        def capture(rate: float) -> None:
            named = policy.model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
            take(rate)

        policy.step = capture  # type: ignore[method-assign]
        run = make_run(policy, algorithm=settings, training=training, rollout={"temperature": TEMPERATURE})
        self.metrics = optimizer_step(run, sequences() if batch is None else batch, 1e-3)
        self.biases = [bias.clone() for bias in policy.routing.biases.values()] if policy.routing else []


SETTINGS = {"router_aux_loss_coef": 0.5, "router_bias_update_rate": 0.01}


@pytest.fixture(scope="module")
def whole(tiny_moe: Path) -> Step:
    """The step in one micro-batch."""
    return Step(tiny_moe, **SETTINGS)


def test_loads_are_logged_without_being_asked_for_and_nothing_else_is_done(tiny_moe: Path) -> None:
    step = Step(tiny_moe)
    assert {name for name in step.metrics if name.startswith("router/")} == NAMES
    assert 1 <= step.metrics["router/max_load"] <= 4
    assert "aux_loss" not in step.metrics
    assert all(float(bias.abs().max()) == 0 for bias in step.biases)


@pytest.mark.slow
def test_the_split_into_micro_batches_changes_nothing(tiny_moe: Path, whole: Step) -> None:
    many = Step(tiny_moe, micro_batch_size=3, **SETTINGS)
    for name in (*NAMES, "router/max_bias"):
        assert whole.metrics[name] == many.metrics[name]
    assert many.metrics["aux_loss"] == pytest.approx(whole.metrics["aux_loss"], rel=1e-5)
    total = whole.metrics["policy_loss"] + 0.5 * whole.metrics["aux_loss"]
    assert whole.metrics["loss"] == pytest.approx(total, rel=1e-5)
    for name, gradient in whole.gradients.items():
        difference = (many.gradients[name] - gradient).abs().max()
        assert difference <= 2e-5 + 1e-3 * gradient.abs().max(), name
    for a, b in zip(whole.biases, many.biases, strict=True):
        assert torch.equal(a, b)
        assert set(a.abs().tolist()) <= {0.0, float(torch.tensor(0.01))}
        assert a.max() > 0 > a.min(), "up for some, down for others"


def test_the_loss_of_the_router_needs_no_advantage(tiny_moe: Path) -> None:
    batch = sequences()
    for s in batch:
        s.advantage = 0.0
    assert not with_signal(batch, make_recipe(tiny_moe))
    step = Step(tiny_moe, batch, router_aux_loss_coef=0.1)
    assert step.metrics["grad_norm"] > 0
    assert step.metrics["policy_loss"] == 0


def test_a_step_that_is_begun_again_counts_its_tokens_once(
    tiny_moe: Path, whole: Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = step_module.backward, []

    def short_of_memory(*arguments: Any) -> Any:
        tries.append(real(*arguments))
        if len(tries) == 1:
            raise DoesNotFit(8, 500)
        return tries[-1]

    monkeypatch.setattr(step_module, "backward", short_of_memory)
    again = Step(tiny_moe, **SETTINGS)
    assert len(tries) == 2
    assert {n: again.metrics[n] for n in NAMES} == {n: whole.metrics[n] for n in NAMES}
    assert all(torch.equal(a, b) for a, b in zip(again.biases, whole.biases, strict=True))


def test_the_supervised_stage_has_them_too(tiny_moe: Path) -> None:
    settings = {"router_aux_loss_coef": 0.1, "router_bias_update_rate": 0.01}
    policy, logged = make_policy(tiny_moe, algorithm=settings), {}
    run = make_run(policy, algorithm=settings)
    run.log = type("Log", (), {"log": lambda self, step, metrics: logged.update(metrics)})()
    train_step(run, [Example([5, 6, 7], [8, 9, 10, 11]), Example([5, 6], [7, 8])])
    assert NAMES | {"aux_loss", "router/max_bias"} <= logged.keys()
    assert logged["loss"] == pytest.approx(logged["policy_loss"] + 0.1 * logged["aux_loss"], rel=1e-5)
    assert logged["router/max_bias"] == pytest.approx(0.01)


def test_loads_are_summed_over_processes() -> None:
    """Another process's loads decide with this one's in which way a bias goes."""
    moves: list[torch.Tensor] = []
    routing = SimpleNamespace(move_biases=moves.extend, largest_bias=lambda: 0.5)
    algorithm = AlgorithmConfig(router_bias_update_rate=1.0)
    experts = StepExperts(cast(Any, SimpleNamespace(routing=routing)), algorithm)
    experts.loads = [torch.tensor([8.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)]
    theirs = torch.tensor([0.0, 8.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    other = cast(Any, SimpleNamespace(reduce=lambda loads, reduction: loads + theirs))
    assert experts.finish(other)["router/max_load"] == pytest.approx((1 + 1.5) / 2)
    assert [each.tolist() for each in moves] == [[0.0, 0.0], [-1.0, -1.0, 1.0]]
