"""A step with experts: their loads, loss and bias are those of the whole step, however it is split or begun again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data.tiny import write_tiny_model
from grpo.sft import train_step
from grpo.types import TrainedSequence
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


def test_loads_are_in_the_metrics_and_a_dense_model_has_none(tiny_moe: Path, tiny_model: Path) -> None:
    step = Step(tiny_moe)
    assert {name for name in step.metrics if name.startswith("router/")} == NAMES
    assert 1 <= step.metrics["router/max_load"] <= 4
    assert "aux_loss" not in step.metrics
    assert not {name for name in Step(tiny_model).metrics if name.startswith("router/")}
    assert all(float(bias.abs().max()) == 0 for bias in step.biases), "nothing moves them unless the recipe asks"


@pytest.mark.slow
def test_the_split_into_micro_batches_changes_nothing(tiny_moe: Path) -> None:
    settings = {"router_aux_loss_coef": 0.5, "router_bias_update_rate": 0.01}
    one, many = (Step(tiny_moe, micro_batch_size=size, **settings) for size in (None, 3))
    for name in (*NAMES, "router/max_bias"):
        assert one.metrics[name] == many.metrics[name]
    assert one.metrics["aux_loss"] == pytest.approx(many.metrics["aux_loss"], rel=1e-5)
    assert one.metrics["loss"] == pytest.approx(one.metrics["policy_loss"] + 0.5 * one.metrics["aux_loss"], rel=1e-5)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(
            many.gradients[name], gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n} {m}"
        )
    for a, b in zip(one.biases, many.biases, strict=True):
        assert torch.equal(a, b)
        assert set(a.abs().tolist()) <= {0.0, float(torch.tensor(0.01))}
        assert a.max() > 0 > a.min(), "up for some, down for others"


def test_the_loss_of_the_router_needs_no_advantage(tiny_moe: Path) -> None:
    batch = sequences()
    for s in batch:
        s.advantage = 0.0
    assert Step(tiny_moe, batch).metrics == {"skipped": 1.0}
    assert with_signal(batch, make_recipe(tiny_moe, algorithm={"router_aux_loss_coef": 0.1}).algorithm)
    step = Step(tiny_moe, batch, router_aux_loss_coef=0.1)
    assert step.metrics["grad_norm"] > 0
    assert step.metrics["policy_loss"] == 0


def test_a_step_that_is_begun_again_counts_its_tokens_once(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, real, tries = Step(tiny_moe, router_bias_update_rate=0.01), step_module.backward, []

    def short_of_memory(*arguments: Any) -> Any:
        found = real(*arguments)
        tries.append(found)
        if len(tries) == 1:
            raise DoesNotFit(8, 500)
        return found

    monkeypatch.setattr(step_module, "backward", short_of_memory)
    again = Step(tiny_moe, router_bias_update_rate=0.01)
    assert len(tries) == 2
    assert {n: again.metrics[n] for n in NAMES} == {n: plain.metrics[n] for n in NAMES}
    assert all(torch.equal(a, b) for a, b in zip(again.biases, plain.biases, strict=True))


def test_the_supervised_stage_has_them_too(tiny_moe: Path) -> None:
    settings = {"router_aux_loss_coef": 0.1, "router_bias_update_rate": 0.01}
    policy, logged = make_policy(tiny_moe, algorithm=settings), {}
    run = make_run(policy, algorithm=settings)
    run.log = type("Log", (), {"log": lambda self, step, metrics: logged.update(metrics)})()
    train_step(run, [([5, 6, 7], [8, 9, 10, 11]), ([5, 6], [7, 8])])
    assert NAMES | {"aux_loss", "router/max_bias"} <= logged.keys()
    assert logged["loss"] == pytest.approx(logged["policy_loss"] + 0.1 * logged["aux_loss"], rel=1e-5)
    assert logged["router/max_bias"] == pytest.approx(0.01)


def test_loads_are_summed_over_processes(tiny_moe: Path) -> None:
    """Another process's loads decide with this one's in which way a bias goes."""
    policy = make_policy(tiny_moe, algorithm={"router_bias_update_rate": 1.0})
    experts = StepExperts(policy, make_recipe(tiny_moe, algorithm={"router_bias_update_rate": 1.0}).algorithm)
    mine = torch.tensor([8.0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    theirs = torch.tensor([0.0, 8, 8, 8, 8, 8, 8, 8], dtype=torch.float64)
    experts.loads = [mine] * 3
    other = type("Two", (), {"reduce": lambda self, x, reduction: x + torch.cat([theirs] * 3)})()
    assert experts.finish(other)["router/max_load"] == 1.0
    assert all(float(bias.abs().max()) == 0 for bias in policy.routing.biases.values())
