"""Episodes: completions in which an environment answers the model between its turns.

``play`` is the one way to sample, with an environment or without. It resets an environment for each completion, puts
what ``reset`` says into its prompt, has the backend draw turn after turn, and says of each completion what became of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from grpo.backends.base import Backend, OnGroup, Request, Sampling, Turns
from grpo.config import Recipe
from grpo.types import Completion, Group

OnPlayed = Callable[[int, Group], None]
"""Called once with each request's place and its group, in the thread that called ``play``."""


class Episodes:
    """The environment of a recipe, ready to be played: its class and tools are loaded and checked.

    ``tools`` are the JSON schemas of the tools, as chat templates take them; empty for a game (``step``).
    """

    tools: list[dict[str, Any]]

    def begin(self, requests: Sequence[Request]) -> Played:
        """Reset an environment for each key and make the requests that the backend is to be given."""
        raise NotImplementedError


class Played:
    """A batch of episodes under way. ``requests`` and ``turns`` are for the backend's ``generate`` or ``submit``; there
    may be more requests than were asked for, since completions of one prompt may begin differently. ``turns`` is None
    without an environment."""

    requests: list[Request]
    turns: Turns | None

    def then(self, on_group: OnPlayed | None) -> OnGroup:
        """What to give to the backend as ``on_group``."""
        raise NotImplementedError

    def groups(self, completions: list[list[Completion]], on_group: OnPlayed | None = None) -> list[Group]:
        """The groups, in the order of the requests that were asked for, from what the backend returned. Calls
        ``on_group`` for those that it was not called for yet."""
        raise NotImplementedError


@contextmanager
def open_episodes(recipe: Recipe, tokenizer: Any, stop_token_ids: Sequence[int]) -> Iterator[Episodes | None]:
    """The environment of a recipe for as long as the block lasts; None where it has none.

    Raises:
        UserError: the environment cannot be had, or does not fit the recipe; every problem with its place.
    """
    yield None


def begin(episodes: Episodes | None, requests: Sequence[Request]) -> Played:
    """``play`` in parts, for a backend that samples while the policy trains: ``submit(played.requests, …)``, then
    ``played.groups(collect(flight, played.then(on_group)), on_group)``."""
    raise NotImplementedError


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
    raise NotImplementedError
