"""What a run's metrics and rollout files say of episodes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grpo.metrics import completion_metrics, episode_metrics, rollout_rows, staleness_metrics
from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn, VersionSpan

CALLS = (ToolCall("add", '{"a": 1, "b": 2}', "3"), ToolCall("", "{", "that is no JSON", "malformed"))


def completion(turns: list[Turn], tokens: int, status: Status, spans: list[VersionSpan], **of: str) -> Completion:
    reward = None if "failure" in of else 1.0
    return Completion(list(range(tokens)), [0.0] * tokens, status, "x", spans, Episode(turns, reward, **of))


def groups() -> list[Group]:
    asks = Turn(2, 5, "tool_call", None, CALLS, "<tool_call>")
    tool = completion([asks, Turn(9, 10, "stop", 0.25, (), "3")], 10, Status.STOP, [], opening="it begins")
    game = completion(
        [Turn(0, 2, "stop", 0.0, (), "31", "lower", True), Turn(4, 6, "stop", 1.0, (), "7", "found")],
        6, Status.ENVIRONMENT, [VersionSpan(0, 3, 8), VersionSpan(3, 6, 10)],
    )  # fmt: skip
    late = completion([Turn(0, 4, "length", text="…")], 4, Status.LENGTH, [])
    failed = completion([], 0, Status.ERROR, [], failure="timeout", message="no answer within 10 s")
    rewards = {"environment": [1.25, 2.0, 1.0, None]}
    return [Group(Prompt(7, "q", "q", [1]), [tool, game, late, failed], rewards["environment"], rewards)]


def test_lengths_are_the_models_tokens() -> None:
    found = completion_metrics(groups())
    assert found["completions/mean_length"] == 12 / 4
    assert found["completions/max_length"] == 4
    assert found["completions/clipped_ratio"] == 0.25
    assert found["completions/mean_terminated_length"] == 4  # the tool's and the game's, which its environment ended


def test_turns_calls_and_how_episodes_ended() -> None:
    assert episode_metrics(groups(), tools=True) == {
        "completions/mean_turns": 5 / 4,
        "completions/max_turns": 2.0,
        "completions/mean_environment_tokens": 8 / 4,
        "completions/ended/stop": 0.25,
        "completions/ended/length": 0.25,
        "completions/ended/error": 0.25,
        "completions/ended/environment": 0.25,
        "completions/ended/turns": 0.0,
        "environment/failed/timeout": 1.0,
        "environment/cut_frequency": 1 / 5,
        "tools/call_frequency": 0.5,
        "tools/failure_frequency": 0.5,
        "tools/errors/malformed": 1.0,
    }
    assert not [name for name in episode_metrics(groups(), tools=False) if name.startswith("tools/")]


def test_without_a_call_there_is_still_how_often_tools_are_called() -> None:
    alone = [Group(Prompt(0, "", "", [1]), [completion([Turn(0, 1, "stop")], 1, Status.STOP, [])], [1.0])]
    found = episode_metrics(alone, tools=True)
    assert (found["tools/call_frequency"], found["tools/failure_frequency"]) == (0.0, 0.0)


def test_a_tokens_age_is_of_those_that_the_model_drew() -> None:
    """Of the game's four, two are of policy 8 and two of policy 10."""
    found = staleness_metrics(groups(), 10)
    assert found == {"sampling/staleness/mean": 1.0, "sampling/staleness/max": 2.0}


def test_rows_show_a_conversation() -> None:
    rows = json.loads(json.dumps(rollout_rows(groups(), 3)))
    tool, game, late, failed = rows
    assert tool["turns"] == [
        {"role": "environment", "text": "it begins", "tokens": 2},
        {
            "role": "assistant",
            "text": "<tool_call>",
            "tokens": 3,
            "ended": "tool_call",
            "calls": [
                {"name": "add", "arguments": '{"a": 1, "b": 2}', "result": "3", "error": ""},
                {"name": "", "arguments": "{", "result": "that is no JSON", "error": "malformed"},
            ],
        },
        {"role": "environment", "text": "", "tokens": 4},
        {"role": "assistant", "text": "3", "tokens": 1, "ended": "stop", "reward": 0.25},
    ]
    assert (tool["num_tokens"], tool["environment_tokens"]) == (4, 6)
    assert [(turn["role"], turn["text"], turn["tokens"]) for turn in game["turns"]] == [
        ("assistant", "31", 2),
        ("environment", "lower", 2),
        ("assistant", "7", 2),
        ("environment", "found", 0),  # said when all was over: the model has not read it
    ]
    assert [turn.get("cut") for turn in game["turns"]] == [None, True, None, None]
    assert len(late["turns"]) == 1
    assert (failed["failure"], failed["failure_message"]) == ("timeout", "no answer within 10 s")
    assert failed["turns"] == []
    assert "failure" not in tool


@pytest.mark.parametrize("by_turn", [False, True])
def test_rows_say_advantages(by_turn: bool) -> None:
    advantages = np.arange(8.0).reshape(1, 4, 2) if by_turn else np.arange(4.0).reshape(1, 4)
    rows = rollout_rows(groups(), 3, advantages)
    if by_turn:
        assert "advantage" not in rows[0]
        of_model = [turn["advantage"] for turn in rows[1]["turns"] if turn["role"] == "assistant"]
        assert of_model == [2.0, 3.0]
    else:
        assert [row["advantage"] for row in rows] == [0.0, 1.0, 2.0, 3.0]
