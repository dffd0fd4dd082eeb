"""Episodes on a real server: each turn is a request with all that was before it, whose keys the engine still has."""

from __future__ import annotations

import re
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.backends.base import Sampling
from tests.answering import Answering, by_place
from tests.conftest import make_policy
from tests.launching import ROOT
from tests.vllm_engine.conftest import TINY, ServerProcess
from tests.vllm_engine.runs import metrics, on, recipe, rollouts, train
from tests.vllm_engine.test_trust import connect, prompts, requests, shift, teacher_forced


def hits(server: ServerProcess) -> float:
    """Tokens that the server's prefix cache has served."""
    metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return sum(map(float, re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_an_episode_is_what_one_forward_pass_computes(tiny_server: ServerProcess, temperature: float) -> None:
    policy = make_policy(TINY)
    backend = connect(policy, tiny_server)
    backend.sync(policy, 0)
    shift(policy)
    backend.sync(policy, 1)
    policy.stop_token_ids = []  # or episodes are shorter than a block of the cache, which is 128 tokens on a CPU
    rule = lambda place, turn: by_place(place, turn % 2) if turn < 14 else None  # noqa: E731
    turns = Answering(rule, max_turn_length=20, stop=["="], max_environment_tokens=90)
    before = hits(tiny_server)
    groups = backend.generate(requests(policy), Sampling(360, temperature), 1, turns=turns)
    backend.close()
    assert hits(tiny_server) > before, "no request was served by the prefix cache"
    for r, group in enumerate(groups):
        for g, completion in enumerate(group):
            expected = teacher_forced(policy, prompts(policy)[r], list(completion.token_ids), temperature)
            whole: list[int] = []
            for call in turns.of((r, g)):
                assert call.start == len(whole)
                drawn = range(call.start, len(call.tokens))
                found = torch.tensor([completion.sampler_logprobs[i] for i in drawn])
                torch.testing.assert_close(found, expected[drawn], atol=1e-4, rtol=0)
                if call.ended == "stop":
                    assert "=" in policy.tokenizer.decode(call.tokens[call.start :])
                whole = [*call.tokens, *(call.reply or [])]
            assert whole == completion.token_ids
            assert {span.version for span in completion.versions} == {1}
    assert {call.ended for call in turns.asked} == {"stop", "length"}


def test_episodes_are_sampled_steps_ahead_and_resumed_with_what_was_in_flight(
    tmp_path: Path, tiny_server: ServerProcess
) -> None:
    folder, again = tmp_path / "run", tmp_path / "again"
    sections: dict[str, Any] = {
        "rollout": on(tiny_server, max_staleness=1, max_completion_length=48),
        "environment": {
            "path": f"{ROOT}/tests/environments/worlds_for_tests.py:Counts",
            "max_turn_length": 16,
            "max_observation_length": 24,
        },
        "rewards": [],
        "algorithm": {"credit": "turn"},
        "training": {"max_steps": 5, "save_every": 3, "save_total_limit": 4},
    }
    done = train(recipe(folder, **sections))
    assert done.returncode == 0, done.stderr
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 6))
    assert max(row["sampling/staleness/max"] for row in rows) == 1
    assert max(row["completions/mean_turns"] for row in rows) > 2
    for row in rows:
        of_step = rollouts(folder, row["step"])
        assert {v for r in of_step for _, _, v in r["versions"]} <= {row["step"] - 2, row["step"] - 1}
        assert all(r["versions"][-1][1] == r["num_tokens"] + r["environment_tokens"] for r in of_step)
        assert row["grad_norm"] > 0

    # The same run from its checkpoint on: the next step trains on the very episodes that were ahead.
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints/step_000005")
    done = train(recipe(again, **sections), "--resume")
    assert done.returncode == 0, done.stderr
    assert "is lost" not in done.stderr
    assert rollouts(folder, 4) == rollouts(again, 4)
