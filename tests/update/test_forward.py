"""The forward passes before an update: replayed completions are compared with the policy that sampled them."""

from __future__ import annotations

from grpo.types import Completion, Group, Prompt, Status, TrainedSequence
from grpo.update.forward import with_sampler_as_old


def test_only_replayed_groups_take_the_samplers_logprobs_as_old() -> None:
    completions = [Completion([5 + g, 7], [-2.0, -3.0], Status.STOP, "", []) for g in range(2)]
    groups = [Group(Prompt(row, "", "", [1]), completions, replayed=row == 2) for row in (1, 2)]
    sequences = [
        TrainedSequence([1], c.token_ids, c.sampler_logprobs, 1.0) for group in groups for c in group.completions
    ]
    found = with_sampler_as_old(sequences, groups)
    assert [s.old_logprobs for s in found] == [None, None, [-2.0, -3.0], [-2.0, -3.0]]
    assert [s.completion_ids for s in found] == [s.completion_ids for s in sequences]
