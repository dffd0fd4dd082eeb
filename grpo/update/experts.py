"""A mixture of experts in an optimizer step: where its tokens went, the loss that evens it out, the move of the biases.

On a dense model nothing of this does anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from grpo.config import AlgorithmConfig
from grpo.losses import balance_loss, bias_moves, expert_loads, load_metrics
from grpo.model.policy import Policy
from grpo.types import Batch

LossAndSums = tuple[torch.Tensor, dict[str, torch.Tensor]]


class StepExperts:
    """The loads of one optimizer step's experts. A step that is begun again needs another one."""

    def __init__(self, policy: Policy, algorithm: AlgorithmConfig):
        self.routing = policy.routing
        self.coef, self.rate = algorithm.router_aux_loss_coef, algorithm.router_bias_update_rate
        self.loads: list[torch.Tensor] = []

    def around(self, loss_of: Callable[[Batch], LossAndSums], batch: Batch, sequences: int) -> LossAndSums:
        """``loss_of(batch)``, a micro-batch's share of the loss and its sums, with the balance loss added, which is a
        mean over the step's ``sequences``. Counts where the tokens of the passes with a gradient went."""
        if self.routing is None:
            return loss_of(batch)
        with self.routing.recorded() as layers:
            loss, sums = loss_of(batch)
        loads = expert_loads(layers, batch)
        self.loads = [a + b for a, b in zip(self.loads, loads, strict=True)] if self.loads else loads
        if self.coef > 0:
            balance = balance_loss(layers, batch) / sequences
            sums = {"policy_loss": loss.detach()} | sums | {"aux_loss": balance.detach()}
            loss = loss + self.coef * balance
        return loss, sums

    def finish(self, accelerator: Accelerator) -> dict[str, float]:
        """After the optimizer's step: metrics of the loads over all processes, and the move of the biases. Called by
        all processes."""
        if self.routing is None or not self.loads:
            return {}
        sizes = [len(loads_E) for loads_E in self.loads]
        loads = accelerator.reduce(torch.cat(self.loads), reduction="sum").split(sizes)
        metrics = load_metrics(loads)
        if self.rate > 0:
            self.routing.move_biases(bias_moves(loads, self.rate))
            metrics["router/max_bias"] = self.routing.largest_bias()
        return metrics
