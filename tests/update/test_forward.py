"""The forward passes before an update: replayed completions are compared with the policy that sampled them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo.types import Completion, Group, Prompt, Status, TrainedSequence
from grpo.update import forward
from grpo.update.forward import with_sampler_as_old
from grpo.update.step import update
from tests.conftest import make_policy, make_run


def test_only_replayed_groups_take_the_samplers_logprobs_as_old() -> None:
    completions = [Completion([5 + g, 7], [-2.0, -3.0], Status.STOP, "", []) for g in range(2)]
    groups = [Group(Prompt(row, "", "", [1]), completions, replayed=row == 2) for row in (1, 2)]
    sequences = [
        TrainedSequence([1], c.token_ids, c.sampler_logprobs, 1.0) for group in groups for c in group.completions
    ]
    found = with_sampler_as_old(sequences, groups)
    assert [s.old_logprobs for s in found] == [None, None, [-2.0, -3.0], [-2.0, -3.0]]
    assert [s.completion_ids for s in found] == [s.completion_ids for s in sequences]


@pytest.mark.parametrize(("algorithm", "computed"), [({}, 4), ({"beta": 0.1}, 6), ({"loss_type": "kl_cov"}, 6)])
def test_old_log_probabilities_are_computed_of_what_an_update_needs(
    tiny_model: Path, tmp_path: Path, algorithm: dict[str, Any], computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a group without signal, unless the loss is one that it counts in; never of a completion that is masked."""
    policy = make_policy(tiny_model, needs_reference="beta" in algorithm)
    run = make_run(policy, tmp_path, algorithm={"num_iterations": 2} | algorithm, rollout={"max_completion_length": 8})
    completions = [Completion([50 + g, 60, 70], [-5.0] * 3, Status.STOP, "", []) for g in range(3)]
    groups = [Group(Prompt(row, "", "", [5, 6 + row]), completions, [1.0, 0.0, 0.0]) for row in range(3)]
    groups[2].rewards = [None] * 3
    advantages_PG = np.array([[1.0, -0.5, 0.0], [0.0] * 3, [0.0] * 3])
    advantages_PG[0, 2], advantages_PG[1, 0] = -0.5, 0.1
    seen: list[int] = []
    found = forward.sequence_statistics

    def counted(run: Any, sequences: list[TrainedSequence], *, reference: bool) -> Any:
        seen.append(len(sequences))
        return found(run, sequences, reference=reference)

    monkeypatch.setattr(forward, "sequence_statistics", counted)
    updates = update(run, groups, advantages_PG, 1e-4)
    assert seen[0] == computed
    assert all(np.isfinite(u["loss"]) for u in updates)
    assert updates[0]["sampling/sampling_logp_difference/mean"] > 0
