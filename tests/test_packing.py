"""Micro-batches: nothing lost, nothing twice, budgets kept, equal counts on every process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.packing import collate, packed_tokens, padded_tokens, plan_micro_batches
from grpo.types import TrainedSequence


def sequence(prompt: int, completion: int, **fields: object) -> TrainedSequence:
    return TrainedSequence(
        list(range(1, prompt + 1)), list(range(50, 50 + completion)), [-1.0] * completion, 1.0, **fields
    )


def groups_of(*groups: tuple[int, list[int]]) -> list[TrainedSequence]:
    """Sequences of several prompts that differ, by (prompt length, completion lengths)."""
    return [
        TrainedSequence([100 + i] * prompt, list(range(50, 50 + n)), [-1.0] * n, 1.0)
        for i, (prompt, completions) in enumerate(groups)
        for n in completions
    ]


@pytest.mark.parametrize("packed", [True, False])
@given(
    st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 60), min_size=1, max_size=9)), max_size=9),
    st.integers(1, 5),
    st.integers(20, 400),
    st.one_of(st.none(), st.integers(1, 9)),
)
def test_every_sequence_once_within_budget_and_equal_counts(packed, groups, world_size, budget, most) -> None:
    sequences = groups_of(*groups)
    plan = plan_micro_batches(sequences, max_tokens=budget, max_sequences=most, world_size=world_size, packed=packed)
    tokens_of = packed_tokens if packed else padded_tokens
    assert len(plan) == world_size
    assert len({len(share) for share in plan}) == 1
    placed = [id(s) for share in plan for micro_batch in share for s in micro_batch if s.weight]
    assert sorted(placed) == sorted(id(s) for s in sequences)
    for share in plan:
        for micro_batch in share:
            assert len(micro_batch) == 1 or tokens_of(micro_batch) <= budget
            assert most is None or len(micro_batch) <= most
            prompts = [s.prompt_ids[0] for s in micro_batch]
            assert not packed or len(set(prompts)) == sum(
                a != b for a, b in zip(prompts, [None, *prompts], strict=False)
            )


def test_groups_stay_together_where_the_budget_allows_and_are_split_where_it_does_not() -> None:
    sequences = groups_of((10, [11] * 4), (10, [11] * 4), (10, [11] * 4))  # 50 tokens each
    (share,) = plan_micro_batches(sequences, max_tokens=80)
    assert [len({s.prompt_ids[0] for s in m}) for m in share] == [1, 1, 1]
    (share,) = plan_micro_batches(sequences, max_tokens=100)
    assert sorted(len(m) for m in share) == [4, 8]
    (share,) = plan_micro_batches(sequences, max_tokens=30)
    assert sorted(len(m) for m in share) == [2] * 6


def test_work_is_balanced_by_tokens() -> None:
    sequences = groups_of((4, [60, 58, 10, 9]), (4, [8, 7, 30, 31]))
    plan = plan_micro_batches(sequences, max_tokens=64, world_size=2, packed=False)
    work = [sum(padded_tokens(m) for m in share) for share in plan]
    assert max(work) / min(work) < 1.4


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_what_one_process_could_hold_is_shared_out(world_size: int) -> None:
    """Four groups over three processes: one is split, rather than one process doing two while others do one."""
    sequences = groups_of(*[(20, [31] * 8)] * 4)
    plan = plan_micro_batches(sequences, max_tokens=10_000, world_size=world_size)
    assert {len(share) for share in plan} == {1}
    work = [sum(packed_tokens(m) for m in share) for share in plan]
    assert max(work) < 1.2 * packed_tokens(sequences) / world_size + 20 + 30


def test_a_packed_row_holds_each_prompt_once_and_no_last_token() -> None:
    a = TrainedSequence([1, 2], [50, 51, 52], [-1.0] * 3, 1.0, old_logprobs=[-0.1, -0.2, -0.3], ref_logprobs=[-1.0] * 3)
    b = TrainedSequence([3], [60], [-1.0], 1.0, old_logprobs=[-0.5], ref_logprobs=[-5.0], valid=False)
    c = TrainedSequence([1, 2], [70, 71], [-1.0] * 2, 1.0, old_logprobs=[-0.6, -0.7], ref_logprobs=[-6.0, -7.0])
    batch = collate([a, b, c], pad_token_id=7)
    #                                     prompts  | a's    | c's, then b's, which is empty
    assert batch.input_ids_RN.tolist() == [[1, 2, 3, 50, 51, 70]]
    assert batch.layout is not None
    assert batch.layout.position_ids_1N.tolist() == [[0, 1, 0, 2, 3, 2]]
    assert batch.layout.segments == batch.layout.segments_on_device.tolist() == [0, 2, 3, 5, 6, 6]
    assert batch.layout.groups == [3, 6, 6]
    assert batch.layout.groups_on_device.tolist() == [0, 3, 3]
    assert batch.predicts_BT.tolist() == [[1, 3, 4], [2, 0, 0], [1, 5, 0]]
    assert batch.completion_ids_BT.tolist() == [[50, 51, 52], [60, 7, 7], [70, 71, 7]]
    assert batch.completion_mask_BT.int().tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]  # the invalid one is computed, not counted
    torch.testing.assert_close(batch.old_logps_BT[0], torch.tensor([-0.1, -0.2, -0.3]))
    torch.testing.assert_close(batch.ref_logps_BT[1], torch.tensor([-5.0, 0.0, 0.0]))


def test_padded_rows_predict_each_token_from_the_one_before() -> None:
    a, b = sequence(2, 3), sequence(1, 1)
    batch = collate([a, b], pad_token_id=7, packed=False)
    assert batch.layout is None
    assert batch.input_ids_RN.tolist() == [[1, 2, 50, 51, 52], [1, 50, 7, 7, 7]]
    assert batch.predicts_BT.tolist() == [[1, 2, 3], [5, 0, 0]]


def test_zero_weight_sequences_do_not_count() -> None:
    assert collate([sequence(2, 3, weight=0.0)], pad_token_id=0).mask_BT.sum() == 0
