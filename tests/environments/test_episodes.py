"""Episodes with real environments in real processes; the model is a script (``playing.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo.backends.base import Sampling
from grpo.config import Recipe
from grpo.environments.episodes import Episodes, open_episodes, play
from grpo.types import Completion, Group, Status
from tests.conftest import make_recipe
from tests.environments.playing import Script, ScriptedBackend, bytes_tokenizer, calls, request, says

HERE = Path(__file__).parent
FAILING = f"{HERE}/worlds_for_tests.py:Failing"
TOKENIZER = bytes_tokenizer()
ENDS = [TOKENIZER.convert_tokens_to_ids("<|im_end|>")]


def recipe_of(environment: dict[str, Any], **sections: Any) -> Recipe:
    rewards = sections.pop("rewards", [])
    return make_recipe(Path("unused"), environment=environment, rewards=rewards, **sections)


@contextmanager
def opened(tokenizer: Any = TOKENIZER, /, data: Any = None, **environment: Any) -> Iterator[Episodes]:
    environment = {"path": FAILING, "timeout": 5.0} | environment
    with open_episodes(recipe_of(environment, data=data or {}), tokenizer, ENDS) as episodes:
        assert episodes is not None
        yield episodes


def played(episodes: Episodes, script: Script, *, tokens: int = 10_000, **asked: Any) -> Group:
    tokenizer = asked.pop("tokenizer", episodes.tokenizer)
    backend = ScriptedBackend(tokenizer, script)
    (group,) = play(episodes, backend, [request(tokenizer, **asked)], Sampling(tokens), 3)
    return group


def only(group: Group) -> Completion:
    (completion,) = group.completions
    return completion


def test_tools_are_called_and_the_reward_is_the_environments() -> None:
    with opened() as episodes:
        assert [tool["function"]["name"] for tool in episodes.tools] == ["add", "fail", "roll", "wait"]
        completion = only(played(episodes, says("I add. " + calls("add", number=3), calls("add", number=4), "7")))
    assert completion.status is Status.STOP
    episode = completion.episode
    assert episode is not None
    assert (episode.reward, episode.failure, episode.total_reward()) == (7.0, "", 7.0)
    assert [turn.ended for turn in episode.turns] == ["tool_call", "tool_call", "stop"]
    assert [[call.result for call in turn.calls] for turn in episode.turns] == [["3"], ["7"], []]
    assert completion.text == f"I add. {calls('add', number=3)}\n{calls('add', number=4)}\n7"
    # Every token is there as it came, and none of the environment's is a turn's.
    first, second, third = episode.turns
    text = TOKENIZER.decode(completion.token_ids)
    assert text == (
        f"I add. {calls('add', number=3)}\n<tool_response>\n3\n</tool_response>\n"
        f"{calls('add', number=4)}\n<tool_response>\n7\n</tool_response>\n7<|im_end|>"
    )
    assert (
        TOKENIZER.decode(completion.token_ids[first.end : second.start]) == "\n<tool_response>\n3\n</tool_response>\n"
    )
    assert (first.start, third.end) == (0, len(completion.token_ids))
    assert len(completion.sampler_logprobs) == len(completion.token_ids) == completion.versions[-1].end
