"""A batch of episodes: how they begin, and the groups that come of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from grpo.backends.base import OnGroup, Place, Request, Turns
from grpo.environments.conversation import Conversation, Reply
from grpo.errors import RunError
from grpo.types import Completion, Group, Prompt, Status

OnPlayed = Callable[[int, Group], None]
"""Called once with each request's place and its group, in the thread that called ``play``."""


class Answer(Protocol):
    """``Turns.answer``."""

    def __call__(self, place: Place, token_ids: Sequence[int], start: int, ended: str, *, last: bool) -> Reply: ...


@dataclass
class Opening:
    """How the episodes of one request begin. ``prompt`` is what the prompts of all of them begin with; ``leads`` are
    the tokens of each behind it, with their text. ``prompts`` are whole, None where an episode cannot begin."""

    prompt: Prompt
    conversations: Sequence[Conversation]
    prompts: Sequence[Prompt | None]
    leads: Sequence[tuple[list[int], str]]

    @classmethod
    def of(cls, asked: Prompt, conversations: Sequence[Conversation], prompts: Sequence[Prompt | None]) -> Opening:
        begun = [prompt for prompt in prompts if prompt is not None]
        if not begun:
            return cls(asked, conversations, prompts, [([], "")] * len(prompts))
        first = begun[0]
        if all(prompt.token_ids == first.token_ids for prompt in begun):
            return cls(first, conversations, prompts, [([], "")] * len(prompts))
        shared = _shared([prompt.token_ids for prompt in begun])
        if not shared:
            raise RunError(
                f"environment: the prompts of row {asked.id} differ in their first token, by what reset says; let the "
                "row's prompt end in a line break or a space"
            )
        text = first.text[: _shared([prompt.text for prompt in begun])]
        leads = [([], "") if p is None else (p.token_ids[shared:], p.text[len(text) :]) for p in prompts]
        together = replace(first, prompt=asked.prompt, text=text, token_ids=first.token_ids[:shared])
        return cls(together, conversations, prompts, leads)

    def requests(self) -> list[tuple[Prompt, list[int]]]:
        """The prompts to sample from, each once, with the samples that begin with it."""
        found: dict[tuple[int, ...], tuple[Prompt, list[int]]] = {}
        for sample, prompt in enumerate(self.prompts):
            if prompt is not None:
                found.setdefault(tuple(prompt.token_ids), (prompt, []))[1].append(sample)
        return list(found.values())

    @property
    def over(self) -> bool:
        return all(conversation.over.done() for conversation in self.conversations)

    def group(self, sampled: Mapping[int, Completion]) -> Group:
        """The group, from what was sampled for each sample. Waits until all episodes are over."""
        completions = []
        for sample, (conversation, lead) in enumerate(zip(self.conversations, self.leads, strict=True)):
            conversation.over.result()
            completions.append(conversation.completion(sampled.get(sample), *lead))
        return Group(self.prompt, completions)


def _shared(sequences: list[list[int]] | list[str]) -> int:
    """How many entries they all begin with."""
    ordered: list[Any] = sorted(sequences)
    low, high = ordered[0], ordered[-1]  # all others are between them
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


class Played:
    """A batch of episodes under way, or without ``openings`` of plain completions.

    ``requests`` and ``turns`` are for the backend's ``generate`` or ``submit``; there may be more requests than were
    asked for, since completions of one prompt may begin differently. ``turns`` is None without an environment.
    """

    def __init__(
        self,
        asked: Sequence[Request],
        openings: Sequence[Opening] | None = None,
        turns: Callable[[Answer], Turns] | None = None,
    ) -> None:
        self.turns = None if turns is None else turns(self._answer)
        self.requests: list[Request] = []
        self._asked, self._openings = asked, openings
        self._pieces: list[tuple[int, list[int]]] = []  # of each of the backend's requests: whose, and which samples
        self._sampled: list[dict[int, Completion]] = [{} for _ in asked]
        self._taken: set[int] = set()
        self._missing = [0] * len(asked)
        self._groups: dict[int, Group] = {}
        for place, request in enumerate(asked):
            every = [(request.prompt, list(range(len(request.keys))))]
            for prompt, samples in every if openings is None else openings[place].requests():
                self.requests.append(Request(prompt, [request.keys[sample] for sample in samples]))
                self._pieces.append((place, samples))
                self._missing[place] += 1

    def then(self, on_group: OnPlayed | None) -> OnGroup:
        """What to give to the backend as ``on_group``."""

        def ended(piece: int, completions: list[Completion]) -> None:
            self._take(piece, completions)
            self._hand_out(on_group, [place for place in range(len(self._asked)) if self._is_over(place)])

        return ended

    def groups(self, completions: list[list[Completion]], on_group: OnPlayed | None = None) -> list[Group]:
        """The groups, in the order of the requests that were asked for, from what the backend returned. Calls
        ``on_group`` for those that it was not called for yet."""
        for piece, of_piece in enumerate(completions):
            self._take(piece, of_piece)
        self._hand_out(on_group, range(len(self._asked)))
        return [self._groups[place] for place in range(len(self._asked))]

    def close(self) -> None:
        """End what still runs."""
        for opening in self._openings or []:
            for conversation in opening.conversations:
                conversation.close()

    def _answer(self, place: Place, token_ids: Sequence[int], start: int, ended: str, *, last: bool) -> Reply:
        return self._conversation(*place).answer(token_ids, start, ended, last)

    def _conversation(self, piece: int, sample: int) -> Conversation:
        assert self._openings is not None
        place, samples = self._pieces[piece]
        return self._openings[place].conversations[samples[sample]]

    def _take(self, piece: int, completions: list[Completion]) -> None:
        """Take in the completions of one of the backend's requests; a second time changes nothing."""
        if piece in self._taken:
            return
        self._taken.add(piece)
        place, samples = self._pieces[piece]
        self._sampled[place] |= dict(zip(samples, completions, strict=True))
        self._missing[place] -= 1
        if self._openings is not None:
            for sample, completion in enumerate(completions):
                self._conversation(piece, sample).ended_by_backend(completion.status is Status.ERROR)

    def _is_over(self, place: int) -> bool:
        return not self._missing[place] and (self._openings is None or self._openings[place].over)

    def _hand_out(self, on_group: OnPlayed | None, places: Sequence[int]) -> None:
        """Make the groups of these places that were not made yet."""
        for place in places:
            if place in self._groups:
                continue
            sampled = self._sampled[place]
            if self._openings is None:
                self._groups[place] = Group(self._asked[place].prompt, [sampled[i] for i in range(len(sampled))])
            else:
                self._groups[place] = self._openings[place].group(sampled)
            if on_group is not None:
                on_group(place, self._groups[place])
