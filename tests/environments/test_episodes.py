"""Episodes with real environments in real processes; the model is a script (``playing.py``)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from grpo.backends.base import Request, Sampling
from grpo.config import Recipe
from grpo.environments.episodes import Episodes, open_episodes, play
from grpo.environments.worlds import Worlds
from grpo.types import Completion, Group, Status
from tests.conftest import make_recipe
from tests.environments.chat_templates import QWEN
from tests.environments.playing import Script, ScriptedBackend, bytes_tokenizer, calls, request, says
from tests.launching import ROOT

HERE = Path(__file__).parent
FAILING = f"{HERE}/worlds_for_tests.py:Failing"
TOKENIZER = bytes_tokenizer()
ENDS = [TOKENIZER.convert_tokens_to_ids("<|im_end|>")]


def recipe_of(environment: dict[str, Any], **sections: Any) -> Recipe:
    rewards = sections.pop("rewards", [])
    return make_recipe(Path("unused"), environment=environment, rewards=rewards, **sections)


@contextmanager
def opened(tokenizer: Any = TOKENIZER, /, **environment: Any) -> Iterator[Episodes]:
    rewards = environment.pop("rewards", [])
    recipe = recipe_of({"path": FAILING, "timeout": 20.0} | environment, rewards=rewards)
    with open_episodes(recipe, tokenizer, ENDS) as episodes:
        assert episodes is not None
        yield episodes


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    """The processes of one environment, for all tests that need no other."""
    with opened() as episodes:
        yield episodes.worlds


def of(worlds: Worlds, tokenizer: Any = TOKENIZER, data: dict[str, Any] | None = None, **environment: Any) -> Episodes:
    """Its episodes by another recipe."""
    return Episodes(recipe_of({"path": FAILING} | environment, data=data or {}), tokenizer, ENDS, worlds)


def played(episodes: Episodes, script: Script, *, tokens: int = 10_000, **asked: Any) -> Group:
    tokenizer = asked.pop("tokenizer", episodes.tokenizer)
    backend = ScriptedBackend(tokenizer, script)
    (group,) = play(episodes, backend, [request(tokenizer, **asked)], Sampling(tokens), 3)
    return group


def only(group: Group) -> Completion:
    (completion,) = group.completions
    return completion


def test_tools_are_called_and_the_reward_is_the_environments(worlds: Worlds) -> None:
    episodes = of(worlds)
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


def test_other_tools_beside_the_environments_and_alone() -> None:
    tools = [f"{HERE}/worlds_for_tests.py:shout", f"{HERE}/worlds_for_tests.py:later"]
    with opened(tools=tools) as episodes:
        assert [tool["function"]["name"] for tool in episodes.tools] == [
            "shout",
            "later",
            "add",
            "fail",
            "roll",
            "wait",
        ]
        turns = [calls("later", text="b"), calls("shout", text="a"), calls("add", number=1), "done"]
        episode = only(played(episodes, says(*turns))).episode
        assert episode is not None
        assert [call.result for turn in episode.turns for call in turn.calls] == ["b later", "A!", "1"]
    with opened(path=None, tools=tools, rewards=[{"name": "countdown"}]) as episodes:
        assert not episodes.pays
        episode = only(played(episodes, says(calls("shout", text="a"), "done"))).episode
        assert episode is not None
        assert (episode.turns[0].calls[0].result, episode.reward) == ("A!", None)


def test_malformed_calls_are_answered_and_counted(worlds: Worlds) -> None:
    turns = ('<tool_call>{"name": "ad"}</tool_call>', calls("add", number="x"), "<tool_call>{", calls("add", number=1))
    episodes = of(worlds)
    # Without a chat template a turn ends at </tool_call>; the third has none and ends with its last token.
    episode = only(played(episodes, says(*turns, "1"))).episode
    assert episode is not None
    assert [[call.error for call in turn.calls] for turn in episode.turns] == [
        ["unknown_tool"],
        ["wrong_type"],
        ["unclosed"],
        [""],
        [],
    ]
    assert episode.turns[0].calls[0].result == '{"error": "there is no tool \'ad\'; did you mean add?"}'
    assert episode.reward == 1.0


def test_an_answer_that_is_read_in_part_is_marked(worlds: Worlds) -> None:
    episodes = of(worlds, max_observation_length=120)
    completion = only(played(episodes, says(calls("fail", how="long_reply"), calls("add", number=1), "so")))
    assert completion.episode is not None
    assert [turn.cut for turn in completion.episode.turns] == [True, False, False]
    first, second, _ = completion.episode.turns
    assert second.start - first.end <= 120


def test_a_tool_that_raises_costs_nothing_but_the_answer(worlds: Worlds) -> None:
    episodes = of(worlds)
    completion = only(played(episodes, says(calls("fail", how="raises"), calls("add", number=2), "2")))
    assert completion.status is Status.STOP
    assert completion.episode is not None
    (call,) = completion.episode.turns[0].calls
    assert (call.result, call.error) == ('{"error": "ValueError: of its own"}', "raised")
    assert completion.episode.reward == 2.0


def test_limits_of_turns_and_tokens(worlds: Worlds) -> None:
    more = calls("add", number=1)
    episodes = of(worlds, max_turns=3)
    completion = only(played(episodes, says(more)))
    assert (completion.status, len(completion.episode.turns)) == (Status.TURNS, 3)  # type: ignore[union-attr]
    # The last turn's call is made, though nobody reads the answer.
    assert completion.episode.reward == 3.0  # type: ignore[union-attr]
    assert completion.episode.turns[-1].end == len(completion.token_ids)  # type: ignore[union-attr]
    length = len(more.encode())
    completion = only(played(episodes, says(more), tokens=length + 20))
    assert (completion.status, completion.num_model_tokens) == (Status.LENGTH, length + 20)
    assert completion.episode.turns[-1].calls[0].error == "unclosed"  # type: ignore[union-attr]
    completion = only(played(episodes, says(more), tokens=2 * length))
    assert completion.status is Status.LENGTH
    assert completion.episode.reward == 2.0  # type: ignore[union-attr]
    assert only(played(episodes, says("cut off"), tokens=3)).status is Status.LENGTH
    episodes = of(worlds, max_turn_length=20)
    completion = only(played(episodes, says("thinks on and on and on", "never comes here")))
    assert (completion.status, completion.episode.turns[0].ended) == (Status.LENGTH, "length")  # type: ignore[union-attr]
    completion = only(played(episodes, says(calls("add", number=1), "so")))
    assert completion.episode.turns[0].calls[0].error == "unclosed"  # type: ignore[union-attr]
    assert completion.status is Status.STOP


def test_a_chat_may_call_several_tools_in_one_turn(worlds: Worlds) -> None:
    tokenizer = bytes_tokenizer(QWEN)
    episodes = of(worlds, tokenizer, {"template": "chat", "max_prompt_length": 5000}, max_observation_length=1000)
    assert episodes.stop == ()
    turn = f"{calls('add', number=1)}\n{calls('add', number=2)}"
    completion = only(played(episodes, says(turn, "3")))
    assert completion.episode is not None
    assert [call.result for call in completion.episode.turns[0].calls] == ["1", "3"]
    assert tokenizer.decode(completion.token_ids) == (
        f"{turn}<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n3\n"
        "</tool_response><|im_end|>\n<|im_start|>assistant\n3<|im_end|>"
    )
    told = {"template": "chat", "max_prompt_length": 5000}
    cut = of(worlds, tokenizer, told, max_observation_length=1000, max_turns=1, max_turn_length=len(turn) + 3)
    completion = only(played(cut, says(f"{turn} and so on")))
    assert completion.episode is not None
    assert (completion.status, completion.episode.turns[0].ended) == (Status.TURNS, "length")
    many = "\n".join(calls("add", number=1) for _ in range(30))
    completion = only(played(episodes, says(many, "so")))
    assert completion.episode is not None
    made = completion.episode.turns[0].calls
    assert 2 < len([call for call in made if not call.error]) < 30
    assert made[-1].error == "too_many"
    assert completion.episode.reward == sum(not call.error for call in made)
    assert "more calls of this turn were not made" in tokenizer.decode(completion.token_ids)
    assert completion.episode.turns[1].start - completion.episode.turns[0].end <= 1000


def test_a_game_gets_every_turn() -> None:
    with opened(path=f"{HERE}/worlds_for_tests.py:Game", args={"steps": 3}) as episodes:
        assert (episodes.tools, episodes.stop, episodes.pays) == ([], (), True)
        completion = only(played(episodes, says("one", "two", "three", "never"), said="x"))
        assert completion.status is Status.ENVIRONMENT
        episode = completion.episode
        assert episode is not None
        assert [(turn.text, turn.reward, turn.observation) for turn in episode.turns] == [
            ("one", 3.0, "heard one"),
            ("two", 3.0, "heard two"),
            ("three", 5.0, "heard three"),
        ]
        assert (episode.reward, episode.total_reward()) == (None, 11.0)
        assert TOKENIZER.decode(completion.token_ids) == (
            "one<|im_end|>\nheard one\ntwo<|im_end|>\nheard two\nthree<|im_end|>"
        )
    with opened(path=f"{HERE}/worlds_for_tests.py:Game", args={"steps": 3}, max_turns=2) as episodes:
        completion = only(played(episodes, says("one", "two", "three")))
        assert (completion.status, len(completion.episode.turns)) == (Status.TURNS, 2)  # type: ignore[union-attr]
        assert only(played(episodes, says("one"), tokens=2)).status is Status.LENGTH


def test_what_reset_says_belongs_to_the_prompt(worlds: Worlds) -> None:
    episodes = of(worlds)
    group = played(episodes, says("7"), says=" now", keys=[1, 2])
    assert (group.prompt.prompt, group.prompt.text) == ("ask now", "ask now")
    assert TOKENIZER.decode(group.prompt.token_ids) == "ask now"
    assert {TOKENIZER.decode(c.token_ids) for c in group.completions} == {"7<|im_end|>"}


def test_prompts_that_differ_share_what_they_begin_with() -> None:
    asked: list[str] = []

    def script(of: Any, sample: int, turn: int, so_far: str) -> str:
        asked.append(so_far)
        return f"I heard {so_far[-2:]}"

    with opened(path=f"{HERE}/worlds_for_tests.py:Draws") as episodes:
        group = played(episodes, script, keys=[1, 2, 3, 4])
        again = played(episodes, script, keys=[1, 2, 3, 4])
    drawn = {"even": " even 2", "odd": " odd 1"}
    own = [drawn["odd" if random.Random(key).randint(0, 9) % 2 else "even"] for key in (1, 2, 3, 4)]
    assert len(set(own)) == 2
    assert sorted(set(asked)) == sorted({f"ask{said}" for said in own})
    assert (group.prompt.text, TOKENIZER.decode(group.prompt.token_ids), group.prompt.prompt) == ("ask ", "ask ", "ask")
    for completion, said in zip(group.completions, own, strict=True):
        assert completion.episode is not None
        (turn,) = completion.episode.turns
        assert TOKENIZER.decode(completion.token_ids) == f"{said[1:]}I heard {said[-2:]}<|im_end|>"
        assert (turn.start, turn.end) == (len(said) - 1, len(completion.token_ids))
        assert completion.episode.opening == said[1:]
        assert completion.sampler_logprobs == [0.0] * turn.start + [-1.0] * (turn.end - turn.start)
        assert [(span.start, span.end) for span in completion.versions] == [(0, turn.end)]
        assert completion.environment_places() == tuple(range(turn.start))
    assert group == again


def test_a_message_of_the_users_gets_what_reset_says(worlds: Worlds) -> None:
    tokenizer = bytes_tokenizer(QWEN)
    messages = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "So"}]
    episodes = of(worlds, tokenizer, {"template": "chat", "max_prompt_length": 5000})
    backend, row = ScriptedBackend(tokenizer, says("7")), request(tokenizer, says=" now")
    asked = Request(replace(row.prompt, prompt=messages), row.keys)
    (group,) = play(episodes, backend, [asked], Sampling(100), 0)
    assert group.prompt.prompt == [{"role": "user", "content": "ask now"}, messages[1]]
    assert group.prompt.text.endswith("<|im_start|>user\nask now<|im_end|>\n<|im_start|>assistant\nSo")
    assert "roll" in group.prompt.text  # the template shows the tools
    assert messages[0]["content"] == "ask"


def test_a_prompt_that_reset_makes_too_long_is_not_sampled(worlds: Worlds) -> None:
    episodes = of(worlds, data={"max_prompt_length": 10})
    group = played(episodes, says("7"), says=" now it is too long", keys=[1, 2])
    assert [(c.status, list(c.token_ids)) for c in group.completions] == [(Status.ERROR, [])] * 2
    assert "more than data.max_prompt_length = 10" in group.completions[0].episode.message  # type: ignore[union-attr]


def test_draws_come_from_the_completions_key_and_hashes_are_fixed(worlds: Worlds) -> None:
    def rolled(episodes: Episodes, keys: list[int]) -> list[str]:
        group = played(episodes, says(calls("roll"), calls("roll"), "done"), keys=keys)
        return ["/".join(t.calls[0].result for t in c.episode.turns[:2]) for c in group.completions]  # type: ignore[union-attr]

    one = rolled(of(worlds), [5, 6, 2**64 - 1])
    with opened() as episodes:
        two = rolled(episodes, [6, 5, 2**64 - 1])
    assert one == [two[1], two[0], two[2]]
    dice, numbers, hashes = (
        set(of_all) for of_all in zip(*(said.partition("/")[0].split() for said in one), strict=True)
    )
    assert (len(dice), len(numbers), len(hashes)) == (3, 3, 1)


def test_the_models_tokens_are_not_tokenized_again() -> None:
    """Pieces of words that the tiny tokenizer would never put like this."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny_base")
    odd = tokenizer.convert_tokens_to_ids(["1", "##2", "##3", "ch", "c", "##h", "##e", "##c", "##k"])
    odd = [token for token in odd if token != tokenizer.unk_token_id]
    assert tokenizer.encode(tokenizer.decode(odd)) != odd

    class Odd(ScriptedBackend):
        def _turn(self, of: Any, place: Any, sampling: Any, turns: Any) -> Any:
            row = self.rows[place]
            start = len(row.tokens)
            row.tokens += [*odd, 1]
            row.drawn += len(odd) + 1
            row.turns += 1
            return turns.answer(place, row.tokens, start, "stop", last=False)

    game = {"path": f"{HERE}/worlds_for_tests.py:Game", "args": {"steps": 2}, "max_observation_length": 40}
    with opened(tokenizer, **game) as episodes:
        (group,) = play(episodes, Odd(tokenizer, says("")), [request(tokenizer)], Sampling(100), 0)
        completion = only(group)
        assert completion.episode is not None
        for turn in completion.episode.turns:
            assert completion.token_ids[turn.start : turn.end] == [*odd, 1]


def test_a_backend_that_begins_an_episode_again_finds_the_same_environment(worlds: Worlds) -> None:
    """As one does whose server was lost."""

    class Restarting(ScriptedBackend):
        def _turn(self, of: Any, place: Any, sampling: Any, turns: Any) -> Any:
            row = self.rows[place]
            if row.turns == 2 and self.answers[0][0] != "again":
                self.answers.insert(0, ("again",))
                row.tokens, row.turns = [], 0
            return super()._turn(of, place, sampling, turns)

    script = says(calls("roll"), calls("add", number=2), "done")
    episodes = of(worlds)
    once = only(played(episodes, script, keys=[5]))
    (group,) = play(episodes, Restarting(TOKENIZER, script), [request(TOKENIZER, keys=[5])], Sampling(10_000), 3)
    assert only(group) == once
    assert once.episode is not None
    assert once.episode.reward == 2.0


def test_a_backend_that_gives_up_is_no_failure_of_the_environment(worlds: Worlds) -> None:
    class GivesUp(ScriptedBackend):
        def _completion(self, row: Any, version: int) -> Completion:
            return Completion([], [], Status.ERROR, "", [])

    episodes = of(worlds)
    backend = GivesUp(TOKENIZER, says(calls("roll"), "done"))
    (group,) = play(episodes, backend, [request(TOKENIZER)], Sampling(10_000), 3)
    completion = only(group)
    assert (completion.status, completion.episode.failure) == (Status.ERROR, "")  # type: ignore[union-attr]
    assert completion.episode.turns == []  # type: ignore[union-attr]


class Plain:
    """A backend of an older kind: it knows no turns."""

    def generate(self, requests: Any, sampling: Any, version: int, on_group: Any = None) -> Any:
        groups = [[Completion([key], [0.0], Status.STOP, str(key), []) for key in of.keys] for of in requests]
        on_group(1, groups[1])
        return groups


def test_without_an_environment_the_backend_is_called_as_ever() -> None:
    asked = [request(TOKENIZER, keys=[1, 2]), request(TOKENIZER, keys=[3]), request(TOKENIZER, keys=[])]
    handed: list[tuple[int, Group]] = []
    groups = play(None, Plain(), asked, Sampling(5), 0, lambda place, group: handed.append((place, group)))  # type: ignore[arg-type]
    assert [[c.text for c in group.completions] for group in groups] == [["1", "2"], ["3"], []]
    assert [place for place, _ in handed] == [1, 0, 2]
    assert all(groups[place] is group for place, group in handed)
    assert groups[0].prompt is asked[0].prompt


def test_groups_are_handed_out_once_and_with_their_episodes(worlds: Worlds) -> None:
    asked = [request(TOKENIZER, keys=[1, 2]), request(TOKENIZER, keys=[3, 4])]
    handed: list[tuple[int, Group]] = []
    episodes = of(worlds)
    backend = ScriptedBackend(TOKENIZER, says(calls("add", number=2), "done"))
    groups = play(episodes, backend, asked, Sampling(10_000), 0, lambda place, group: handed.append((place, group)))
    assert sorted(place for place, _ in handed) == [0, 1]
    assert all(groups[place] is group for place, group in handed)
    assert [[c.episode.reward for c in group.completions] for group in groups] == [[2.0, 2.0], [2.0, 2.0]]  # type: ignore[union-attr]
