"""Completions in flat arrays: nothing changes on the way, neither between processes nor through a checkpoint."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from grpo.run import exchange
from grpo.run.exchange import gather_groups, pack, pack_prompt, unpack, unpack_prompt
from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn, VersionSpan

SINGLE = [float(np.float32(x)) for x in (-0.1, -1e-30, -math.inf, math.nan)]


def completion(ids: list[int], logprobs: list[float], text: str = "t", *versions: int) -> Completion:
    spans = [VersionSpan(i, i + 1, version) for i, version in enumerate(versions)]
    return Completion(ids, logprobs, list(Status)[len(ids) % 3], text, spans)


MADE = [
    completion([5, 2**31 - 1, 0, 7], SINGLE, "ä\n\udc80", 3, 4),
    completion([], [], "", *[]),
    completion([9], [-0.5], "x", 0),
]


def plain(completions: list[Completion]) -> str:
    """Every field, nan and inf too."""
    return repr([(list(c.token_ids), list(c.sampler_logprobs), c.status, c.text, c.versions) for c in completions])


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("made", [MADE, [], MADE[1:2]], ids=["some", "none", "without a token"])
def test_completions_come_back_to_the_bit(made: list[Completion]) -> None:
    assert plain(unpack(through_a_file(pack(made)))) == plain(made)


def test_numbers_of_single_precision_are_sent_as_such_and_others_whole() -> None:
    assert pack(MADE)["logprobs"].dtype == torch.float32
    finer = [*MADE, completion([1], [-0.1])]  # 0.1 is no number of single precision
    assert pack(finer)["logprobs"].dtype == torch.float64
    assert plain(unpack(pack(finer))) == plain(finer)


def test_a_token_takes_eight_bytes() -> None:
    ids = np.arange(100_000)
    packed = pack([Completion(ids.tolist(), [-0.5] * len(ids), Status.STOP, "", [])])
    assert len(pickle.dumps(packed)) / len(ids) == pytest.approx(8, abs=0.05)


def test_groups_of_all_processes_come_in_the_order_of_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [
        Group(Prompt(i, "q", "q", [i]), [MADE[i % 3], MADE[0]], [1.0, None], {"f": [1.0, None]}, {"f": {"right": 1}})
        for i in range(5)
    ]
    first, second = {0: groups[0], 3: groups[3]}, {1: groups[1], 2: groups[2], 4: groups[4]}
    assert gather_groups(dict(reversed(second.items()))) == [groups[1], groups[2], groups[4]], "alone, as they are"

    sent: list[Any] = []
    monkeypatch.setattr(exchange, "PartialState", lambda: type("Two", (), {"num_processes": 2}))
    monkeypatch.setattr(exchange, "gather_object", lambda mine: sent.extend(pickle.loads(pickle.dumps(mine))) or mine)
    gather_groups(first)
    gather_groups(second)
    monkeypatch.setattr(exchange, "gather_object", lambda mine: sent)
    found = gather_groups(first)
    assert [group.prompt for group in found] == [group.prompt for group in groups]
    for group, expected in zip(found, groups, strict=True):
        assert plain(group.completions) == plain(expected.completions)
        assert (group.rewards, group.rewards_by_function) == (expected.rewards, expected.rewards_by_function)
        assert group.verdicts == expected.verdicts
    assert all(not group.completions for _, rest in sent for _, _, group in rest), "completions go in arrays alone"


def episode(reward: float | None = 1.5) -> Completion:
    calls = (ToolCall("add", '{"a": 1}', "2"), ToolCall("", "{", "no JSON", "malformed"))
    turns = [Turn(1, 2, "tool_call", 0.5, calls, "x", ""), Turn(3, 4, "length", None, (), "y", "higher")]
    made = Episode(turns, reward, "" if reward else "timeout", "" if reward else "10 s", "it begins")
    return Completion([5, 6, 7, 8], [0.0, -1.0, 0.0, -2.0], Status.TURNS, "x\ny", [VersionSpan(0, 4, 2)], made)


def test_episodes_come_back_whole_and_others_cost_nothing() -> None:
    made = [MADE[0], episode(), episode(None)]
    found = unpack(through_a_file(pack(made)))
    assert [one.episode for one in found] == [one.episode for one in made]
    assert found[1].environment_places() == (0, 2)
    assert "episodes" not in pack(MADE)


def test_a_prompt_is_kept_as_it_was_used() -> None:
    """What reset said is part of it; a row's own prompt is made again from the row."""
    row = Prompt(3, "q", "q", [1, 2], "", {"answer": 4})
    used = Prompt(3, "q", "q\nguess", [1, 2, 9], "", {"answer": 4})
    packed = through_a_file(pack_prompt(Group(used, [MADE[0], episode()])))
    assert unpack_prompt(row, packed) == used
    assert pack_prompt(Group(row, [MADE[0]])) is None
    assert unpack_prompt(row, None) is row
