"""The cache's bookkeeping: what it holds moves as lists beside it do."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.backends.hf import kv_cache
from grpo.backends.hf.buffers import Layer
from grpo.backends.hf.kv_cache import DecodeCache, Shape, moves_into_gaps, remove_entries
from grpo.backends.hf.step import PromptGroups

CPU = torch.device("cpu")


def cache_of(prompts: int, sequences: int, *, in_place: bool = False) -> DecodeCache:
    """Sequence s belongs to prompt s % prompts and holds s + 1 tokens; keys are numbers of prompt and sequence."""
    shape = Shape(prompts, kv_cache.SHORT_PROMPT + 1, sequences, sequences, sequences)
    cache = DecodeCache(shape, CPU, in_place=in_place)
    for length in range(1, prompts + 1):
        cache.add_prompt(length)
    for sequence in range(sequences):
        cache.add_sequence(sequence % prompts, sequence + 1)
    cache.layers[0] = layer = Layer.empty(shape, torch.empty(1, 2, 1, 4), torch.empty(1, 2, 1, 4))
    layer.prompt_keys[:] = torch.arange(float(prompts)).view(-1, 1, 1, 1)
    layer.sequence_keys[:] = layer.sequence_values[:] = torch.arange(float(sequences)).view(-1, 1, 1, 1)
    return cache


@given(n=st.integers(1, 12), data=st.data())
def test_sequences_that_leave_are_replaced_by_the_last_ones(n: int, data: st.DataObject) -> None:
    gone = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    cache, running = cache_of(3, n), list(range(n))
    cache.remove_sequences(gone)
    remove_entries(running, gone)
    assert sorted(running) == [s for s in range(n) if s not in gone]
    assert cache.lengths == [s + 1 for s in running]
    assert cache.prompt_of == [s % 3 for s in running]
    for place, sequence in enumerate(running):
        assert (cache.layers[0].sequence_keys[place, :, : sequence + 1] == sequence).all()
        assert (cache.layers[0].sequence_values[place, :, : sequence + 1] == sequence).all()


@given(st.booleans(), st.data())
def test_parked_sequences_keep_what_they_hold_whatever_the_others_do(in_place: bool, data: st.DataObject) -> None:
    """Sequences end, are parked, come back, leave while parked, and the buffers change their size."""
    cache = cache_of(3, 6, in_place=in_place)
    running, parked = list(range(6)), []

    def some(entries: list[int]) -> list[int]:
        return data.draw(st.lists(st.integers(0, len(entries) - 1), unique=True)) if entries else []

    for action in data.draw(st.lists(st.sampled_from(["park", "unpark", "end", "end parked", "resize"]), max_size=8)):
        if action == "park":
            gone = some(running)
            cache.park(gone, [running[place] + 1 for place in gone])
            parked += [running[place] for place in gone]
            remove_entries(running, gone)
        elif action == "unpark":
            back = some(parked)
            cache.unpark(back)
            running += [parked[place] for place in back]
            remove_entries(parked, back)
        elif action == "end":
            gone = some(running)
            cache.remove_sequences(gone)
            remove_entries(running, gone)
        elif action == "end parked":
            gone = some(parked)
            cache.remove_parked(gone)
            remove_entries(parked, gone)
        else:
            fewest = max(1, len(running) + len(parked))
            cache.resize_sequences(Shape(3, kv_cache.SHORT_PROMPT + 1, data.draw(st.integers(fewest, 9)), 8, 6))
        assert cache.lengths == [s + 1 for s in running]
        assert [cache.held(place) for place in range(len(running))] == [s + 1 for s in running]
        assert cache.prompt_of == [s % 3 for s in running]
        assert cache.parked_lengths == [s + 1 for s in parked]
        assert cache.parked_prompt_of == [s % 3 for s in parked]
        keys = cache.layers[0].sequence_keys
        rows = [*cache.rows, *cache.parked_rows]
        for row, sequence in zip(rows, [*running, *parked], strict=True):
            assert (keys[row, :, : sequence + 1] == sequence).all()
        if not in_place:
            ends = [len(keys) - 1 - i for i in range(len(parked))]
            assert rows == [*range(len(running)), *ends], "running ones are the first, parked ones the last"
        while len(set(rows)) < len(keys):  # there is a row for every other one, and none is taken
            rows.append(cache.rows[cache.add_sequence(0)])
            assert len(set(rows)) == len(rows)
        cache.remove_sequences(range(len(running), len(cache.rows)))


def test_nothing_moves_that_need_not() -> None:
    assert moves_into_gaps(5, [4, 3]) == []
    assert moves_into_gaps(5, [3, 0]) == [(4, 0)]
    assert moves_into_gaps(5, [1, 0]) == [(3, 0), (4, 1)]


def test_a_sequence_follows_its_prompt_to_another_slot() -> None:
    cache, prompts = cache_of(3, 6), [10, 11, 12]
    gone = [place for place, slot in enumerate(cache.prompt_of) if slot == 0]
    cache.remove_sequences(gone)
    before = [cache.prompt_lengths[slot] for slot in cache.prompt_of]
    cache.remove_prompts([0])
    remove_entries(prompts, [0])
    assert prompts == [12, 11]
    assert cache.prompt_lengths == [3, 2]
    assert [cache.prompt_lengths[slot] for slot in cache.prompt_of] == before
    assert (cache.layers[0].prompt_keys[0, :, :3] == 2).all()


def test_every_sequence_stands_in_a_place_of_its_own_in_its_prompts_group() -> None:
    groups = PromptGroups.of([4, 7, 5], [2, 0, 2, 1, 2], CPU)
    assert (groups.number, groups.group_size, groups.longest) == (3, 3, 7)
    assert groups.place_B.tolist() == [6, 0, 7, 3, 8]
    assert groups.sequence_at[groups.place_B].tolist() == [0, 1, 2, 3, 4]
    assert groups.lengths_B.tolist() == [5, 4, 5, 7, 5]
    heads = torch.arange(10).view(5, 2)  # (B, kv heads)
    into, back = groups.by_kv_head(2)
    assert heads.flatten()[into][back].view(5, 2).tolist() == heads.tolist()


def test_buffers_serve_a_rollout_that_wants_no_more() -> None:
    kept = Shape(prompts=5, prompt_tokens=64, sequences=8, sequence_tokens=100, group_size=4)
    assert kept.holds(kept)
    assert kept.holds(Shape(2, 33, 3, 50, 4))
    for wanted in [(6, 64, 8, 100, 4), (5, 65, 8, 100, 4), (5, 64, 9, 100, 4), (5, 64, 8, 101, 4), (5, 64, 8, 100, 5)]:
        assert not kept.holds(Shape(*wanted))
    assert not kept.holds(Shape(5, kv_cache.SHORT_PROMPT, 8, 50, 4))  # whose sequences begin with their prompt


def test_an_emptied_cache_takes_another_rollout() -> None:
    cache = cache_of(3, 6)
    buffer = cache.layers[0].sequence_keys
    cache.empty()
    assert (cache.longest, cache.add_prompt(7), cache.add_sequence(0)) == (0, 0, 0)
    assert cache.layers[0].sequence_keys is buffer
