"""Where a step's completions come from: sampled when the step needs them, or one step ahead while another trains.

With ``rollout.overlap`` the completions of step k + 1 are asked of policy k while that policy is trained on step k. If
new weights arrive meanwhile, what is in flight goes on under them; each completion says which versions made it. What is
ahead belongs to the run's state: a checkpoint waits for it and holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from grpo.backends.base import Backend, OverlappingBackend, Request, Sampling
from grpo.config import Recipe
from grpo.randomness import Stream, key
from grpo.types import Completion, Group, Prompt, Status, VersionSpan

if TYPE_CHECKING:
    from grpo.tasks import Task

Rows = list[dict[str, Any]]


class Rollouts:
    """The groups of each step, this process's share of them, not yet scored."""

    def __init__(self, recipe: Recipe, task: Task, backend: Backend, accelerator: Accelerator):
        self.recipe, self.task, self.backend, self.accelerator = recipe, task, backend, accelerator
        self.sampling = Sampling.from_recipe(recipe.rollout)
        self.flight: Any = None  # those of the next step, on their way
        self.ahead: list[list[Completion]] | None = None  # or here already

    def take(self, step: int, on_group: Callable[[Group], None]) -> list[Group]:
        """The groups of this step; with overlap, those of the next are asked for before this returns.

        ``on_group`` is called once with each, in the order in which they end, while others are still sampled.
        """
        requests = self._requests(step)
        groups: dict[int, Group] = {}

        def ended(place: int, completions: list[Completion]) -> None:
            groups[place] = Group(requests[place].prompt, completions)
            on_group(groups[place])

        self._land()
        completions, self.ahead = self.ahead, None
        if completions is None:
            completions = self.backend.generate(requests, self.sampling, step, ended)
        if self.recipe.rollout.overlap and step + 1 < self.recipe.training.max_steps:
            overlapping = cast(OverlappingBackend, self.backend)
            self.flight = overlapping.submit(self._requests(step + 1), self.sampling, step)
        for place in range(len(requests)):
            if place not in groups:
                ended(place, completions[place])
        return [groups[place] for place in range(len(requests))]

    def state(self) -> Rows | None:
        """What is ahead, of all processes, for a checkpoint; waits until it is whole. Called by all processes."""
        self._land()
        if self.ahead is None:
            return None
        mine = [asdict(completion) for group in self.ahead for completion in group]
        return [{**row, "status": row["status"].value} for row in gather_object(mine)]

    def restore(self, state: Rows | None) -> None:
        """Inverse of ``state``, for a run that goes on behind the same step."""
        if state is None:
            return
        G, rank = self.recipe.rollout.num_generations, self.accelerator.process_index
        size = self.recipe.training.prompts_per_step // self.accelerator.num_processes
        completions = [
            Completion(
                **{**row, "status": Status(row["status"]), "versions": [VersionSpan(**v) for v in row["versions"]]}
            )
            for row in state[rank * size * G : (rank + 1) * size * G]
        ]
        self.ahead = [completions[g : g + G] for g in range(0, len(completions), G)]

    def _land(self) -> None:
        if self.flight is not None:
            self.ahead, self.flight = cast(OverlappingBackend, self.backend).collect(self.flight), None

    def _requests(self, step: int) -> list[Request]:
        return share_of(rollout_requests(self.recipe, self.task.train_prompts(step), step), self.accelerator)


def rollout_requests(recipe: Recipe, prompts: list[Prompt], step: int) -> list[Request]:
    """Every completion's key: (seed, step, prompt, sample). A prompt that comes twice in a step gets fresh samples."""
    G = recipe.rollout.num_generations
    seen: dict[int, int] = {}
    requests = []
    for prompt in prompts:
        first = seen.get(prompt.id, 0)
        seen[prompt.id] = first + G
        keys = [key(recipe.training.seed, Stream.ROLLOUT.value, step, prompt.id, g) for g in range(first, first + G)]
        requests.append(Request(prompt, keys))
    return requests


def share_of(requests: list[Request], accelerator: Accelerator) -> list[Request]:
    """This process's prompts: a contiguous piece, so that gathering restores the order."""
    size = len(requests) // accelerator.num_processes
    return requests[accelerator.process_index * size : (accelerator.process_index + 1) * size]
