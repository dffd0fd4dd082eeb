"""Where a step's groups come from: sampled when the step needs them, or up to ``max_staleness`` steps ahead of it.

With ``rollout.max_staleness: N`` above 0 a queue of prompts is in flight, in the order in which steps learn from them.
A step takes what it needs from the head; what is missing is asked for at once. Then the queue is filled up to N steps'
worth, P prompts each, and sampled while the policy trains. If new weights arrive meanwhile, completions in flight go on
under them; each completion says which versions made it. A step takes P prompts at least, so what the queue holds after
step k, asked of policy k or later ones, is used up by step k + N: no token is more than N versions old when it is
trained on. ``update.step`` checks that.

The queue belongs to the run's state: a checkpoint waits for what is in flight and holds it, and so is exact. Where the
run is asked to stop it does not wait, and a resumed run asks for the rest again, with the same keys.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator

from grpo.backends.base import Backend, OverlappingBackend, Request, Sampling
from grpo.config import Recipe
from grpo.environments.episodes import Episodes, Played, begin, play
from grpo.randomness import Stream, key
from grpo.run.agreement import check_drawn
from grpo.run.exchange import gather_groups, pack, pack_prompt, unpack, unpack_prompt
from grpo.types import Group, Prompt

if TYPE_CHECKING:
    from grpo.prompts.task import Task

OnGroup = Callable[[Group], None]


@dataclass
class Flight:
    """Prompts that are asked for together. ``requests`` are those of all processes, the same list on each.

    ``asked`` is what is under way and what the backend's ``submit`` returned, None where the backend is to ``generate``
    when a step takes them. ``groups`` are this process's, in order; None before they have ended.
    """

    requests: list[Request]
    asked: tuple[Played, Any] | None = None
    groups: list[Group] | None = None


class Rollouts:
    """Samples the groups of each step: this process's share of them, not yet scored. With ``episodes`` the recipe's
    environment answers."""

    def __init__(
        self,
        recipe: Recipe,
        task: Task,
        backend: Backend,
        accelerator: Accelerator,
        episodes: Episodes | None = None,
    ):
        self.recipe, self.task, self.backend, self.accelerator = recipe, task, backend, accelerator
        self.episodes = episodes
        self.sampling = Sampling.from_recipe(recipe.rollout)
        self.queue: deque[Flight] = deque()
        self.asked_at = -1  # the step that asked last, and the samples of each prompt that it asked for
        self.samples: Counter[int] = Counter()

    def take(self, step: int, prompts: Iterator[Prompt], wanted: int, on_group: OnGroup) -> dict[int, Group]:
        """The next ``wanted`` groups or a few more, in whole flights: this process's, by their places among them.

        ``prompts`` are those behind the queue (``ahead``); what is asked for is drawn from it. ``on_group`` is called
        once with each group of this process, in the order in which they end, while others are still sampled.
        """
        missing = wanted - len(self.ahead)
        if missing > 0:
            self._ask(step, prompts, missing)
        taken = [self.queue.popleft()]
        while sum(len(flight.requests) for flight in taken) < wanted:
            taken.append(self.queue.popleft())
        self._fill(step, prompts)
        return self._by_place(taken, step, on_group)

    @property
    def ahead(self) -> list[int]:
        """The ids of the prompts in the queue."""
        return [request.prompt.id for flight in self.queue for request in flight.requests]

    def state(self, wait: bool = True) -> list[dict[str, Any]] | None:
        """The queue, of all processes, for a checkpoint; None where it is empty. Every process must call this.

        Waits until all completions have ended; without ``wait``, those that have not are left out.
        """
        if not self.queue:
            return None
        ended = [flight for flight in self.queue if wait or flight.groups is not None]
        gathered = iter(gather_groups(self._by_place(ended, self.asked_at, lambda _: None)))
        saved = []
        for flight in self.queue:
            groups = list(islice(gathered, len(flight.requests))) if flight.groups is not None else None
            saved.append(
                {
                    "prompts": [request.prompt.id for request in flight.requests],
                    "keys": [request.keys for request in flight.requests],
                    "used": None if groups is None else [pack_prompt(group) for group in groups],
                    "completions": None if groups is None else pack([c for g in groups for c in g.completions]),
                }
            )
        return saved

    def restore(self, state: list[dict[str, Any]] | None, step: int) -> None:
        """Inverse of ``state``, for a run that resumes before ``step``: what had not ended is asked for again."""
        if state and "prompts" not in state[0]:  # of an older version: the completions of one step, P x G
            state = [{"prompts": [p.id for p in self.task.train_prompts(step)], "keys": None, "completions": state}]
        G = self.recipe.rollout.num_generations
        for saved in state or []:
            prompts = [self.task.prompt(self.task.train, row) for row in saved["prompts"]]
            keys = saved["keys"] or [[0] * G for _ in prompts]
            flight = Flight([Request(prompt, of_prompt) for prompt, of_prompt in zip(prompts, keys, strict=True)])
            if saved["completions"] is None:
                self._submit(flight, step)
            else:
                completions = unpack(saved["completions"])
                used = saved.get("used") or [None] * len(prompts)
                flight.groups = [
                    Group(unpack_prompt(prompts[i], used[i]), completions[i * G : (i + 1) * G])
                    for i in self._share(flight)
                ]
            self.queue.append(flight)

    def forget(self, step: int) -> None:
        """Let what is in the queue end, and drop it: ``step`` asks anew. Every process must call this."""
        self._by_place(list(self.queue), step, lambda _: None)
        self.queue.clear()

    def _fill(self, step: int, prompts: Iterator[Prompt]) -> None:
        """Ask for what the following steps need, as far ahead as they may be.

        How many prompts a step takes is known beforehand, unless it draws on until enough groups have a signal. Then a
        flight has a prompt for each process, so that a step takes what it needs and waits for nothing else.
        """
        P = self.recipe.training.prompts_per_step
        size = self.accelerator.num_processes if self.recipe.prompts.dynamic_sampling else P
        steps = min(self.recipe.rollout.max_staleness, self.recipe.training.max_steps - 1 - step)
        while (room := steps * P - len(self.ahead)) > 0:
            self._ask(step, prompts, min(room, size))

    def _ask(self, step: int, prompts: Iterator[Prompt], number: int) -> None:
        """Put the next prompts at the end of the queue. A completion's key is made of (seed, step, prompt, sample); a
        prompt that is asked for twice in a step gets fresh samples."""
        if step != self.asked_at:
            self.asked_at, self.samples = step, Counter()
        G, seed = self.recipe.rollout.num_generations, self.recipe.training.seed
        requests = []
        for prompt in islice(prompts, number):
            first = self.samples[prompt.id]
            self.samples[prompt.id] += G
            keys = [key(seed, Stream.ROLLOUT.value, step, prompt.id, g) for g in range(first, first + G)]
            requests.append(Request(prompt, keys))
        drawn = ((r.prompt.id, r.prompt.token_ids, r.prompt.columns, r.keys) for r in requests)
        check_drawn(drawn, f"prompts for step {step + 1}")
        flight = Flight(requests)
        if self.recipe.rollout.max_staleness:
            self._submit(flight, step)
        self.queue.append(flight)

    def _submit(self, flight: Flight, step: int) -> None:
        backend = cast(OverlappingBackend, self.backend)
        played = begin(self.episodes, self._mine(flight))
        turns = {} if played.turns is None else {"turns": played.turns}
        flight.asked = played, backend.submit(played.requests, self.sampling, step, **turns)

    def _by_place(self, flights: Sequence[Flight], step: int, on_group: OnGroup) -> dict[int, Group]:
        """This process's groups of the flights, by their places among all groups of these, once they have ended."""
        found: dict[int, Group] = {}
        first = 0
        for flight in flights:
            groups = self._land(flight, step, on_group)
            found |= {first + place: group for place, group in zip(self._share(flight), groups, strict=True)}
            first += len(flight.requests)
        return found

    def _land(self, flight: Flight, step: int, on_group: OnGroup) -> list[Group]:
        """This process's groups of a flight, once they have ended."""
        if flight.groups is not None:
            for group in flight.groups:
                on_group(group)
            return flight.groups

        def ended(_: int, group: Group) -> None:
            on_group(group)

        if flight.asked is None:
            flight.groups = play(self.episodes, self.backend, self._mine(flight), self.sampling, step, ended)
        else:
            played, asked = flight.asked
            try:
                completions = cast(OverlappingBackend, self.backend).collect(asked, played.then(ended))
                flight.groups, flight.asked = played.groups(completions, ended), None
            finally:
                played.close()
        return flight.groups

    def _share(self, flight: Flight) -> range:
        return share_of(len(flight.requests), self.accelerator)

    def _mine(self, flight: Flight) -> list[Request]:
        return [flight.requests[i] for i in self._share(flight)]


def share_of(number: int, accelerator: Accelerator) -> range:
    """This process's share of so many requests: a contiguous piece.

    The number may not divide by the processes (in a step's later rounds of drawing). Then the pieces' sizes differ by
    one, and a piece may be empty.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    return range(number * rank // world, number * (rank + 1) // world)
