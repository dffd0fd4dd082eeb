"""The routers of a mixture of experts: how even a step's load is, the loss that evens it out, the move of the bias.

Only tokens that learn count: each is routed where it is predicted, at the token before it. So a load does not depend
on how sequences were packed or which process computed them, and the loss is a sum over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from grpo.types import Batch, Routed


def expert_loads(layers: Sequence[Routed], batch: Batch) -> list[torch.Tensor]:
    """How many of the batch's tokens went to each expert of each layer, (E,) float64 (exact integers)."""
    counted_M = batch.mask_BT.flatten()[batch.places_M]
    loads = []
    for layer in layers:
        chosen_MK = layer.chosen_NK[_predicts(batch)]
        counted_MK = counted_M[:, None].expand_as(chosen_MK).double()
        loads_E = torch.zeros(layer.logits_NE.shape[-1], dtype=torch.float64, device=chosen_MK.device)
        loads.append(loads_E.index_add_(0, chosen_MK.flatten(), counted_MK.flatten()))
    return loads


def balance_loss(layers: Sequence[Routed], batch: Batch) -> torch.Tensor:
    """The sum over the batch's sequences of E * sum_i f_i P_i, its mean over layers.

    f_i is the share of the sequence's tokens that went to expert i (they sum to K, experts a token), without gradient;
    P_i the mean of the router's normalized scores for it. It is K where the load is even, and E where all goes to one
    expert. Load and probability are those of Switch Transformers (arXiv:2101.03961, equations 4 to 6), taken within
    each sequence as in DeepSeek-V3 (arXiv:2412.19437, equations 17 to 20, which are 1/K of this). There f is counted
    before the bias is added to the scores; here it is where tokens went.
    """
    B, T = batch.mask_BT.shape
    counted_M = batch.mask_BT.flatten()[batch.places_M]
    of_M = batch.places_M // T
    tokens_B1 = counted_M.new_zeros(B).index_add(0, of_M, counted_M)[:, None].clamp(min=1)
    total = counted_M.new_zeros(())
    for layer in layers:
        E = layer.logits_NE.shape[-1]
        probabilities_ME = layer.probabilities()[_predicts(batch)] * counted_M[:, None]
        P_BE = probabilities_ME.new_zeros(B, E).index_add(0, of_M, probabilities_ME) / tokens_B1
        chosen_MK = layer.chosen_NK[_predicts(batch)] + E * of_M[:, None]
        counted_MK = counted_M[:, None].expand_as(chosen_MK)
        f_BE = counted_M.new_zeros(B * E).index_add(0, chosen_MK.flatten(), counted_MK.flatten()).view(B, E) / tokens_B1
        total = total + E * (f_BE * P_BE).sum()
    return total / len(layers)


def load_metrics(loads: Sequence[torch.Tensor]) -> dict[str, float]:
    """How even the loads of a step are, (E,) a layer; means over layers.

    ``router/max_load``: the busiest expert's load over the mean (1 is even; MaxVio of arXiv:2408.15664 is this less 1).
    ``router/load_entropy``: entropy of the loads' shares over log E (1 is even, 0 is one expert).
    ``router/dead_experts``: the share of experts that no token of the step went to.
    """
    shares = [loads_E / loads_E.sum().clamp(min=1) for loads_E in loads]
    busiest = [float(shares_E.max()) * len(shares_E) for shares_E in shares]
    entropies = [-float(torch.xlogy(s_E, s_E).sum()) / math.log(max(len(s_E), 2)) for s_E in shares]
    dead = [float((loads_E == 0).double().mean()) for loads_E in loads]
    found = {"router/max_load": busiest, "router/load_entropy": entropies, "router/dead_experts": dead}
    return {name: sum(values) / len(values) for name, values in found.items()}


def bias_moves(loads: Sequence[torch.Tensor], rate: float) -> list[torch.Tensor]:
    """What is added to the routers' biases after a step, (E,) a layer: ``rate`` for experts below the layer's mean
    load, -``rate`` above it (balancing without an auxiliary loss, arXiv:2408.15664, algorithm 1; DeepSeek-V3)."""
    return [rate * torch.sign(loads_E.mean() - loads_E) for loads_E in loads]


def _predicts(batch: Batch) -> torch.Tensor:
    """(M,) for each token of a completion, where among the R x N tokens it was predicted."""
    return batch.predicts_BT.flatten()[batch.places_M]
