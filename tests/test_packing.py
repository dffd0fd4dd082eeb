"""Micro-batches: nothing lost, nothing twice, budgets kept, equal counts on every process."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.packing import collate, padded_tokens, plan_micro_batches
from grpo.types import Sequence


def sequence(prompt: int, completion: int, **fields: object) -> Sequence:
    return Sequence(list(range(1, prompt + 1)), list(range(50, 50 + completion)), [-1.0] * completion, 1.0, **fields)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(20, 400),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_sequence_once_within_budget_and_equal_counts(lengths, world_size, max_tokens, max_sequences) -> None:
    sequences = [sequence(p, c) for p, c in lengths]
    plan = plan_micro_batches(sequences, max_tokens=max_tokens, max_sequences=max_sequences, world_size=world_size)
    assert len(plan) == world_size
    assert len({len(share) for share in plan}) == 1
    placed = [id(s) for share in plan for micro_batch in share for s in micro_batch if s.weight]
    assert sorted(placed) == sorted(id(s) for s in sequences)
    for share in plan:
        for micro_batch in share:
            assert len(micro_batch) == 1 or padded_tokens(micro_batch) <= max_tokens
            assert max_sequences is None or len(micro_batch) <= max_sequences


def test_work_is_balanced_by_tokens() -> None:
    sequences = [sequence(4, n) for n in (60, 58, 10, 9, 8, 7, 30, 31)]
    plan = plan_micro_batches(sequences, max_tokens=64, world_size=2)
    work = [sum(padded_tokens(m) for m in share) for share in plan]
    assert max(work) / min(work) < 1.4


def test_collate_puts_everything_where_its_token_is() -> None:
    a = sequence(2, 3, old_logprobs=[-0.1, -0.2, -0.3], ref_logprobs=[-1.0, -2.0, -3.0])
    b = sequence(1, 1, old_logprobs=[-0.5], ref_logprobs=[-5.0], valid=False)
    batch = collate([a, b], pad_token_id=7)
    assert batch.input_ids_BT.tolist() == [[1, 2, 50, 51, 52], [1, 50, 7, 7, 7]]
    assert batch.completion_mask_BT.int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.mask_BT.tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]  # the invalid one is computed, not counted
    torch.testing.assert_close(batch.old_logps_BT[0, 2:], torch.tensor([-0.1, -0.2, -0.3]))
    torch.testing.assert_close(batch.ref_logps_BT[1], torch.tensor([0.0, -5.0, 0.0, 0.0, 0.0]))


def test_zero_weight_sequences_do_not_count() -> None:
    assert collate([sequence(2, 3, weight=0.0)], pad_token_id=0).mask_BT.sum() == 0
