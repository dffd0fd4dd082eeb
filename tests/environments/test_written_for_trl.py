"""A class and functions that were written for TRL run unchanged."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.backends.base import Sampling
from grpo.environments.episodes import open_episodes, play
from tests.conftest import make_recipe
from tests.environments.chat_templates import QWEN
from tests.environments.playing import ScriptedBackend, bytes_tokenizer, calls, request, says

TRL = '''
"""Written from the docstrings of TRL's GRPOTrainer (tools, environment_factory) alone."""

import asyncio


class WordCounter:
    """Counts words; the reward is how many were found."""

    def __init__(self):
        self.found = 0

    def reset(self, **kwargs) -> str | None:
        self.found = 0
        self.words = kwargs["words"].split()
        return f" The words: {kwargs['words']}."

    def count(self, word: str, exact: bool = True) -> int:
        """
        Counts how often a word occurs.

        Args:
            word: The word to look for.
            exact: Whether case counts.

        Returns:
            How often it occurs.
        """
        self.found += 1
        words = self.words if exact else [w.lower() for w in self.words]
        return words.count(word if exact else word.lower())

    async def slow_length(self) -> int:
        """
        Counts all words, slowly.

        Returns:
            How many words there are.
        """
        await asyncio.sleep(0.01)
        return len(self.words)

    def get_reward(self) -> float:
        return float(self.found)


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


async def async_add(a: int, b: int) -> int:
    """
    Asynchronously adds two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    await asyncio.sleep(0)
    return a + b
'''


def test_what_was_written_for_trl_runs_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "for_trl.py"
    file.write_text(TRL)
    tokenizer = bytes_tokenizer(QWEN)
    environment = {"path": f"{file}:WordCounter", "tools": [f"{file}:multiply", f"{file}:async_add"]}
    environment["max_observation_length"] = 1000  # type: ignore[assignment]
    data = {"template": "chat", "max_prompt_length": 4000}
    recipe = make_recipe(Path("unused"), environment=environment, data=data, rewards=[])
    turn = "\n".join(
        [
            calls("count", word="a", exact=False),
            calls("multiply", a=6, b=7),
            calls("async_add", a=1, b=2),
            calls("slow_length"),
            calls("missing"),
        ]
    )
    with open_episodes(recipe, tokenizer, [tokenizer.eos_token_id]) as episodes:
        assert episodes is not None
        names = [tool["function"]["name"] for tool in episodes.tools]
        assert names == ["multiply", "async_add", "count", "slow_length"]  # TRL's order
        backend = ScriptedBackend(tokenizer, says(turn, calls("count", word="A"), "done"))
        (group,) = play(episodes, backend, [request(tokenizer, words="a b A")], Sampling(10_000), 0)
    (completion,) = group.completions
    assert completion.episode is not None
    results = [json.loads(call.result) if call.error else call.result for call in completion.episode.turns[0].calls]
    assert results[:4] == ["2", "42", "3", "3"]
    assert "no tool 'missing'" in results[4]["error"]
    assert (completion.episode.reward, completion.status.value) == (2.0, "stop")
    assert group.prompt.text.endswith("<|im_start|>user\nask The words: a b A.<|im_end|>\n<|im_start|>assistant\n")
    assert "Multiplies two integers." in group.prompt.text
