"""Episodes: completions in which an environment answers the model between its turns.

``play`` is the one way to sample, with an environment or without. It resets an environment for each completion, puts
what ``reset`` says into its prompt, has the backend draw turn after turn, and says of each completion what became of
it. ``conversation.py`` is one episode, ``worlds.py`` the processes, ``observations.py`` the tokens between turns.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from grpo.backends.base import Backend, Request, Sampling, Turns
from grpo.config import ENVIRONMENT, EnvironmentConfig, Recipe, Source
from grpo.environments.calls import EXAMPLES, is_lost, parameters_of
from grpo.environments.conversation import Conversation, Rules
from grpo.environments.find import spec_of, tool_format
from grpo.environments.observations import Observations
from grpo.environments.played import Answer, OnPlayed, Opening, Played
from grpo.environments.worlds import Worlds
from grpo.errors import RunError, UserError
from grpo.prompts import templates
from grpo.prompts.answers import STOPS
from grpo.prompts.completion_text import CompletionText
from grpo.types import Group, Prompt

__all__ = ["Episodes", "OnPlayed", "Played", "begin", "check_environment", "open_episodes", "play"]

OPENING = 64  # environments that are constructed and reset at once


@dataclass
class _Turns:
    """``Turns`` of the backend's protocol."""

    stop: Sequence[str]
    max_turn_length: int | None
    max_environment_tokens: int
    overlap_steps: int
    answer: Answer


class Episodes:
    """The environment of a recipe, ready to be played: its class and tools are loaded and checked.

    ``tools`` are the JSON schemas of the tools, as chat templates take them; empty for a game (``step``). ``pays``: the
    environment has a ``get_reward``, or is a game, whose ``step`` may pay.

    Raises:
        UserError: the environment does not fit the recipe.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, stop_token_ids: Sequence[int], worlds: Worlds) -> None:
        assert recipe.environment is not None
        self.config, self.tokenizer, self.worlds = recipe.environment, tokenizer, worlds
        self.about = worlds.about
        self.tools = self.about.tools
        self.pays = self.about.pays or self.about.game
        if not self.pays and any(reward.name == ENVIRONMENT for reward in recipe.functions()):
            raise UserError(
                "rewards: environment is what the environment pays, and this one has no get_reward; name other rewards"
            )
        self.form = tool_format(self.config, recipe.data.sources(), tokenizer, self.about)
        self.max_prompt_length = recipe.data.max_prompt_length
        self.rules = Rules(
            self.about.game,
            self.form,
            parameters_of(self.tools),
            self.config.max_turns,
            CompletionText(tokenizer, stop_token_ids).of,
        )
        self._check_calls()
        self._stop_token_ids = list(stop_token_ids)
        self._sources = {source.label: source for source in recipe.data.sources()}
        self._observations: dict[tuple[str, bool], Observations] = {}
        for source in self._sources.values():
            self._observations_of(source, source.rows.template == "chat")
        plain = any(source.rows.template != "chat" for source in self._sources.values())
        self.stop = () if self.about.game else STOPS[self.form] if plain or self.form == "python" else ()

    def _check_calls(self) -> None:
        """Raise UserError where the tokenizer cannot write a call: what it makes of one is read as none."""
        if self.about.game:
            return
        example = EXAMPLES[self.form]
        text = self.rules.text_of(self.tokenizer.encode(example, add_special_tokens=False))
        if is_lost(self.form, text, self.rules.tools):
            raise UserError(
                f"environment: with this tokenizer no tool can be called: {example!r} comes back from its tokens as "
                f"{text!r}. Take another model, or another environment.tool_format (it is {self.form})"
            )

    def check_columns(self, columns: Mapping[str, Collection[str]]) -> None:
        """Raise UserError where ``reset`` needs a column that rows do not have. ``columns`` are those of each source's
        prompts, without the prompt's own."""
        for label, of_source in columns.items():
            there = {*of_source, self._source(label).rows.prompt_column}
            if missing := [name for name in self.about.needs if name not in there]:
                raise UserError(
                    f"environment: reset needs {', '.join(missing)}: no column of the rows"
                    f"{f' of {label}' if label else ''} ({', '.join(sorted(there))})"
                )

    def begin(self, requests: Sequence[Request]) -> Played:
        """Reset an environment for each key, and make the requests that the backend is to be given."""
        room = threading.BoundedSemaphore(OPENING)
        conversations: list[list[Conversation]] = []
        for request in requests:
            prompt = request.prompt
            row = {self._source(prompt.source).rows.prompt_column: prompt.prompt, **prompt.columns}
            conversations.append([self._opened(row, key, room) for key in request.keys])
        openings = [
            self._opening(request.prompt, of_request)
            for request, of_request in zip(requests, conversations, strict=True)
        ]
        return Played(requests, openings, self._turns)

    def _opened(self, row: dict[str, Any], key: int, room: threading.BoundedSemaphore) -> Conversation:
        room.acquire()
        conversation = Conversation(self.rules, row, lambda: self.worlds.open(key))
        conversation.said.add_done_callback(lambda _: room.release())
        return conversation

    def _opening(self, prompt: Prompt, conversations: Sequence[Conversation]) -> Opening:
        """What each of a prompt's episodes begins with, once all are reset."""
        prompts: dict[str | None, Prompt] = {}
        of_conversation: list[Prompt | None] = []
        for conversation in conversations:
            said = conversation.said.result()
            if conversation.failure is None and said not in prompts:
                prompts[said] = self._prompt_with(prompt, said)
            own = prompts.get(said) if conversation.failure is None else None
            if own is not None and len(own.token_ids) > self.max_prompt_length:
                conversation.fail(
                    "error",
                    f"with what reset says, the prompt has {len(own.token_ids)} tokens, more than "
                    f"data.max_prompt_length = {self.max_prompt_length}; raise it, or let reset say less",
                )
                own = None
            chat = self._source(prompt.source).rows.template == "chat" or not isinstance(prompt.prompt, str)
            conversation.observations = self._observations_of(self._source(prompt.source), chat)
            of_conversation.append(own)
        return Opening.of(prompt, conversations, of_conversation)

    def _prompt_with(self, prompt: Prompt, said: str | None) -> Prompt:
        """The prompt with what ``reset`` said at the end of its last message."""
        if not said:
            return prompt
        question: Any = prompt.prompt
        if isinstance(question, str):
            question = question + said
        else:
            users = [place for place, message in enumerate(question) if message["role"] == "user"]
            last = users[-1] if users else len(question) - 1
            changed = {**question[last], "content": question[last]["content"] + said}
            question = [*question[:last], changed, *question[last + 1 :]]
        rows = self._source(prompt.source).rows
        try:
            text, prefill = templates.of_question(rows, question, self.tokenizer, self.tools)
        except ValueError as why:
            raise RunError(f"environment: the prompt of row {prompt.id} with what reset says: {why}") from None
        token_ids = templates.encode(rows, text, self.tokenizer)
        return replace(prompt, prompt=question, text=text, token_ids=token_ids, prefill=prefill)

    def _turns(self, answer: Answer) -> Turns:
        config = self.config
        return _Turns(self.stop, config.max_turn_length, config.max_environment_tokens, config.overlap_steps, answer)

    def _source(self, label: str) -> Source:
        return self._sources.get(label) or next(iter(self._sources.values()))

    def _observations_of(self, source: Source, chat: bool) -> Observations:
        if (source.label, chat) not in self._observations:
            self._observations[source.label, chat] = Observations(
                source,
                self.tokenizer,
                self._stop_token_ids,
                self.form,
                self.config.max_observation_length,
                chat=chat,
                game=self.about.game,
            )
        return self._observations[source.label, chat]


@contextmanager
def open_episodes(recipe: Recipe, tokenizer: Any, stop_token_ids: Sequence[int]) -> Iterator[Episodes | None]:
    """The environment of a recipe for as long as the block lasts; None where it has none.

    Raises:
        UserError: the environment cannot be had, or does not fit the recipe; every problem with its place.
    """
    config = recipe.environment
    if config is None:
        yield None
        return
    with _worlds(recipe, config) as worlds:
        yield Episodes(recipe, tokenizer, stop_token_ids, worlds)


def check_environment(recipe: Recipe) -> None:
    """What ``open_episodes`` finds of the recipe's environment without a tokenizer. Raises UserError."""
    if recipe.environment is not None:
        _worlds(recipe, recipe.environment).close()


def _worlds(recipe: Recipe, config: EnvironmentConfig) -> Worlds:
    keep = recipe.scoring.environment
    return Worlds(spec_of(config), timeout=config.timeout, memory_gb=config.memory_limit_gb, keep=keep)


def begin(episodes: Episodes | None, requests: Sequence[Request]) -> Played:
    """``play`` in parts, for a backend that samples while the policy trains: ``submit(played.requests, …)``, then
    ``played.groups(collect(flight, played.then(on_group)), on_group)``."""
    return Played(requests) if episodes is None else episodes.begin(requests)


def play(
    episodes: Episodes | None,
    backend: Backend,
    requests: Sequence[Request],
    sampling: Sampling,
    version: int,
    on_group: OnPlayed | None = None,
) -> list[Group]:
    """A group for each request, in their order: its prompt as it was used, and one completion for each key.

    ``on_group`` is called once with each group, in the order in which they end, while others are still sampled where
    the backend can tell.

    Raises:
        RunError: the backend's, or environments cannot be run any more.
    """
    played = begin(episodes, requests)
    turns = {} if played.turns is None else {"turns": played.turns}
    try:
        completions = backend.generate(played.requests, sampling, version, played.then(on_group), **turns)
        return played.groups(completions, on_group)
    finally:
        played.close()
