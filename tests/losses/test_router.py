"""The balance of experts: loss and loads against plain loops, and what does not change them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from grpo.losses import balance_loss, bias_moves, expert_loads, load_metrics
from grpo.packing import collate
from grpo.types import Batch, Routed, TrainedSequence

E, K = 5, 2


def sequences() -> list[TrainedSequence]:
    """Three completions of two prompts; a padding one; one that is not valid; a token that does not count."""
    draw = random.Random(0)
    made = []
    for i, (prompt, length) in enumerate([([1, 2, 3], 4), ([1, 2, 3], 1), ([9, 8], 6), ([9, 8], 2), ([9, 8], 3)]):
        ids = [draw.randrange(10, 99) for _ in range(length)]
        uncounted = (1,) if i == 2 else ()
        weight, valid = float(i != 3), i != 4
        made.append(TrainedSequence(prompt, ids, [0.0] * length, 1.0, valid, weight=weight, uncounted=uncounted))
    return made


def routed_by(batch: Batch, *, sigmoid: bool, layers: int = 2) -> list[Routed]:
    """Logits and choices that are functions of a token, its row and its place."""
    tokens_N = batch.input_ids_RN.flatten()
    made = []
    for layer in range(layers):
        weight_E = torch.arange(1, E + 1, dtype=torch.float64) * (layer + 1.3)
        logits_NE = torch.sin(tokens_N[:, None].double() * weight_E).requires_grad_()
        made.append(Routed(logits_NE, logits_NE.detach().topk(K).indices, sigmoid))
    return made


def by_loops(micro: list[TrainedSequence], *, sigmoid: bool, layers: int = 2) -> tuple[float, list[list[int]]]:
    """(loss, loads of each layer), from the definition, one token after the other."""
    total, loads = 0.0, [[0] * E for _ in range(layers)]
    for s in micro:
        if not (s.weight and s.valid):
            continue
        reads = [s.prompt_ids[-1], *s.completion_ids[:-1]]  # the token before each, where it is routed
        reads = [token for t, token in enumerate(reads) if t not in s.uncounted]
        for layer in range(layers):
            f, P = [0.0] * E, [0.0] * E
            for token in reads:
                logits = [math.sin(token * (e + 1) * (layer + 1.3)) for e in range(E)]
                chosen = sorted(range(E), key=lambda e: -logits[e])[:K]
                scores = [1 / (1 + math.exp(-x)) if sigmoid else math.exp(x) for x in logits]
                for e in range(E):
                    f[e] += (e in chosen) / len(reads)
                    P[e] += scores[e] / sum(scores) / len(reads)
                    loads[layer][e] += e in chosen
            total += E * sum(f[e] * P[e] for e in range(E)) / layers
    return total, loads


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_loads_are_those_of_plain_loops(packed: bool, sigmoid: bool) -> None:
    micro = sequences()
    batch = collate(micro, pad_token_id=0, packed=packed)
    layers = routed_by(batch, sigmoid=sigmoid)
    loss, loads = by_loops(micro, sigmoid=sigmoid)
    assert float(balance_loss(layers, batch)) == pytest.approx(loss, rel=1e-6)
    assert [loads_E.tolist() for loads_E in expert_loads(layers, batch)] == loads


@pytest.mark.parametrize("packed", [False, True])
def test_parts_sum_to_the_whole(packed: bool) -> None:
    """However sequences are put together, loss, loads and the gradient of a token's logits are the same."""
    micro = sequences()

    def totals(parts: list[list[TrainedSequence]]) -> tuple[float, list[list[float]], float]:
        loss, loads, gradient = 0.0, torch.zeros(2, E, dtype=torch.float64), 0.0
        for part in parts:
            batch = collate(part, pad_token_id=0, packed=packed)
            layers = routed_by(batch, sigmoid=True)
            balance = balance_loss(layers, batch)
            gradient += sum(float(g.abs().sum()) for g in torch.autograd.grad(balance, [x.logits_NE for x in layers]))
            loss += float(balance)
            loads += torch.stack(expert_loads(layers, batch))
        return loss, loads.tolist(), gradient

    whole, parts = totals([micro]), totals([[s] for s in micro])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert parts[1] == whole[1]
    assert packed or parts[2] == pytest.approx(whole[2], rel=1e-5)


def test_the_loss_pulls_towards_experts_with_little_load() -> None:
    batch = collate(sequences(), pad_token_id=0, packed=False)
    (layer,) = routed_by(batch, sigmoid=True, layers=1)
    chosen_NK = torch.zeros_like(layer.chosen_NK)
    chosen_NK[:, 1] = 1  # all tokens go to the experts 0 and 1
    (gradient_NE,) = torch.autograd.grad(
        balance_loss([Routed(layer.logits_NE, chosen_NK, True)], batch), layer.logits_NE
    )
    moved_E = gradient_NE.sum(0)
    assert (moved_E[:2] > 0).all(), "a step along the negative gradient lowers the scores of the busy ones"
    assert (moved_E[2:] < 0).all()


def test_even_and_uneven_loads() -> None:
    even, one, half = (torch.tensor(x, dtype=torch.float64) for x in ([3.0] * 4, [8.0, 0, 0, 0], [4.0, 4.0, 0, 0]))
    assert load_metrics([even]) == pytest.approx(
        {"router/max_load": 1.0, "router/load_entropy": 1.0, "router/dead_experts": 0.0}
    )
    assert load_metrics([one]) == pytest.approx(
        {"router/max_load": 4.0, "router/load_entropy": 0.0, "router/dead_experts": 0.75}
    )
    assert load_metrics([one, half]) == pytest.approx(
        {"router/max_load": 3.0, "router/load_entropy": 0.25, "router/dead_experts": 0.625}
    )
    assert [moves.tolist() for moves in bias_moves([one, even], 0.5)] == [[-0.5, 0.5, 0.5, 0.5], [0.0] * 4]
