"""Rewards of episodes: what an environment paid, what other functions are told, and that no word of an environment's is
paid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.config import RewardConfig
from grpo.errors import RunError, UserError
from grpo.scoring.episodes import messages_of
from grpo.scoring.grade import Grader
from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn
from tests.scoring.helpers import scorer

PAYS = RewardConfig(name="environment")
CHAT = [{"role": "user", "content": "6 times 7?"}]


def game(reward: float | None = None, *of_turns: float | None, failure: str = "") -> Completion:
    turns = [Turn(2 * i, 2 * i + 1, "stop", paid, text="hm", observation="higher") for i, paid in enumerate(of_turns)]
    status = Status.ERROR if failure else Status.ENVIRONMENT
    message = f"{failure}: what happened" if failure else ""
    ids = list(range(2 * len(turns) or 2))
    return Completion(ids, [0.0] * len(ids), status, "hm", [], Episode(turns, reward, failure, message))


def with_tool(result: str, answer: str = "I don't know") -> Completion:
    """Tokens 0 to 2 are a call's, 3 to 6 the result's, 7 and 8 the answer's."""
    call = ToolCall("multiply", '{"a": 6, "b": 7}', result)
    asks = Turn(0, 3, "tool_call", calls=(call,), text="<tool_call>…</tool_call>")
    said = Episode([asks, Turn(7, 9, "stop", text=answer)])
    return Completion(list(range(100, 109)), [0.0] * 9, Status.STOP, f"{asks.text}\n{answer}", [], said)


def group(*completions: Completion, prompt: Any = "p", **columns: Any) -> Group:
    return Group(Prompt(0, prompt, "p", [1], "", columns), list(completions))


def test_what_an_environment_paid_is_the_reward_and_needs_no_worker() -> None:
    with scorer(PAYS.model_copy(update={"weight": 2.0})) as s:
        assert s.worker_pids == []
        made = group(game(1.0), game(None, 0.25, 0.5), game(0.5, 0.25, None), game(None, None))
        s.score([made], step=1)
    assert made.rewards == [2.0, 1.5, 1.5, None]
    assert made.rewards_by_function == {"environment": [1.0, 0.75, 0.75, None]}
    assert made.said == {"environment": ["scored", "scored", "scored", "unscored"]}
    assert made.verdicts == {"environment": {"scored": 3, "unscored": 1}}


def test_an_environment_that_never_pays_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with scorer(PAYS) as s:
        s.score([group(game(1.0), game(None, None))], step=1)
        assert caplog.text == ""
        for step in (2, 3):
            s.score([group(game(None), game(None, None), game(failure="timeout"))], step=step)
    told = [line for line in caplog.messages if "paid nothing" in line]
    assert len(told) == 1
    assert told[0].startswith(
        "step 2: the environment paid nothing, not even 0, for any of 2 completions: its get_reward"
    )


def test_failed_episodes_are_counted_by_cause_and_are_no_reward_of_0(caplog: pytest.LogCaptureFixture) -> None:
    with scorer(PAYS) as s:
        gave_up = Completion([], [], Status.ERROR, "", [])
        made = group(game(1.0), game(failure="timeout"), game(failure="memory"), game(float("nan")), gave_up)
        s.score([made], step=3)
        s.score([group(game(1.0), game(failure="timeout"))], step=4)
    assert made.rewards == [1.0, None, None, None, None]
    assert made.verdicts["environment"] == {
        "scored": 1, "timeout": 1, "memory": 1, "not_finite": 1, "not_generated": 1,
    }  # fmt: skip
    first, again = (record.getMessage() for record in caplog.records)
    assert first == (
        "step 3: the environment failed in 3 of 4 completions (timeout 1, memory 1, not_finite 1). The first: "
        "prompt 0, completion 1: timeout: what happened"
    )
    assert again == "step 4: the environment failed in 1 of 2 completions (timeout 1)"


@pytest.mark.parametrize("rewards", [[PAYS], [RewardConfig(name="format")]], ids=["paid", "another function"])
def test_too_many_failed_episodes_end_the_run(rewards: list[RewardConfig]) -> None:
    """Also where the environment's reward is none of the recipe's; not before the whole step is there."""
    with scorer(*rewards, max_failure_rate=0.25) as s:
        scoring = s.start(7)
        scoring.add(group(*[game(1.0)] * 2, *[game(failure="crashed")] * 2))
        scoring.add(group(*[game(1.0)] * 3))
        with pytest.raises(
            RunError, match=r"step 7: the environment failed in 2 of 7 .*\(crashed 2\), more than scoring"
        ):
            scoring.finish()


def test_it_counts_beside_other_functions(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(completions, **_):\n    return [len(c) / 10 for c in completions]\n")
    with scorer(RewardConfig(path=f"{tmp_path}/mine.py:length"), PAYS) as s:
        made = group(game(1.0), game(failure="crashed"))
        s.score([made], step=1)
        assert s.try_out([made], 0, 5.0) == [0.2, None]
    assert made.rewards == [1.2, None]
    assert made.said == {"length": ["scored", "not_generated"], "environment": ["scored", "crashed"]}


def test_there_is_none_for_texts_that_are_there_already() -> None:
    with pytest.raises(UserError, match="what an environment pays for an episode while it is played"):
        Grader(PAYS, workers=1)


def test_messages_are_trls() -> None:
    """``trl.GRPOTrainer._tool_call_loop``: an assistant's message with its calls, a tool's with name and text."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7}}}
    assert messages_of(with_tool("42", "it is 42")) == [
        {"role": "assistant", "content": "<tool_call>…</tool_call>", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "42"},
        {"role": "assistant", "content": "it is 42"},
    ]
    assert [m["role"] for m in messages_of(game(1.0, None, None))] == ["assistant", "user", "assistant"]  # not the last
    assert messages_of(Completion([1], [0.0], Status.STOP, "x", [])) == [{"role": "assistant", "content": "x"}]


def test_a_malformed_call_is_no_call_and_its_answer_is_a_tools() -> None:
    wrong = ToolCall("", "{oops", "not JSON", "malformed")
    other = ToolCall("run", "print(1)", "1")
    turn = Turn(0, 1, "tool_call", calls=(wrong, other), text="…")
    made = Completion([1, 2], [0.0] * 2, Status.STOP, "…", [], Episode([turn, Turn(1, 2, "stop", text="x")]))
    first, *answers = messages_of(made)
    assert [c["function"]["arguments"] for c in first["tool_calls"]] == ["print(1)"]
    assert [a["content"] for a in answers[:2]] == ["not JSON", "1"]


SEES = """
def seen(completions, completion_ids, log_extra, **_):
    log_extra("ids", [list(ids) for ids in completion_ids])
    log_extra("completions", completions)
    return [0.0] * len(completions)
"""


@pytest.mark.parametrize("prompt", ["6 times 7?", CHAT], ids=["text", "chat"])
def test_a_users_function_sees_what_trl_shows_it(tmp_path: Path, prompt: Any) -> None:
    """All tokens; what the model wrote, or with chat prompts the messages of both sides."""
    (tmp_path / "mine.py").write_text(SEES)
    with scorer(RewardConfig(path=f"{tmp_path}/mine.py:seen")) as s:
        made = group(with_tool("42"), prompt=prompt)
        s.score([made], step=1)
    (ids,), (shown,) = made.extra_columns["ids"], made.extra_columns["completions"]
    assert ids == list(range(100, 109))
    assert shown == (messages_of(made.completions[0]) if prompt is CHAT else made.completions[0].text)


def test_what_an_environment_says_is_never_paid() -> None:
    """A tool that writes the answer does not answer for the model; for prompts of text and of messages."""
    columns = {"answer": "#### 42", "nums": [6, 7], "target": 42}
    right = ("<answer>6 * 7</answer>", "<answer>42</answer>")
    leaks, answers = [with_tool(text) for text in right], [with_tool("42", text) for text in right]
    with scorer(RewardConfig(name="countdown"), RewardConfig(name="gsm8k")) as s:
        made = [group(*leaks, *answers, prompt=prompt, **columns) for prompt in ("6 times 7?", CHAT)]
        s.score(made, step=1)
    for one in made:
        assert one.rewards_by_function == {"countdown": [0.0, 0.0, 1.0, 0.0], "gsm8k": [0.0, 0.0, 0.0, 1.0]}


def test_lengths_that_rewards_judge_are_the_models() -> None:
    """Five of nine tokens are its own."""
    overlong = RewardConfig(name="overlong", args={"max_completion_length": 6, "soft_punish_cache": 1})
    again = RewardConfig(name="repetition", args={"ngram_size": 1})
    made = group(with_tool("42"))
    made.completions[0].token_ids = [1, 2, 3, 3, 3, 3, 3, 4, 5]
    with scorer(overlong, again) as s:
        s.score([made], step=1)
    assert made.rewards_by_function == {"overlong": [0.0], "repetition": [0.0]}
