"""Where a step's completions come from: sampled when the step needs them, or one step ahead while another trains.

With ``rollout.overlap`` the completions of step k + 1 are asked of policy k while that policy is trained on step k. If
new weights arrive meanwhile, what is in flight goes on under them; each completion says which versions made it. What is
ahead belongs to the run's state: a checkpoint waits for it and holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from grpo.backends.base import Backend, OverlappingBackend, Request, Sampling
from grpo.config import Recipe
from grpo.randomness import Stream, key
from grpo.types import Completion, Group, Prompt, Status, VersionSpan

if TYPE_CHECKING:
    from grpo.prompts.task import Task

Rows = list[dict[str, Any]]


class Rollouts:
    """The groups of each step, this process's share of them, not yet scored."""

    def __init__(self, recipe: Recipe, task: Task, backend: Backend, accelerator: Accelerator):
        self.recipe, self.task, self.backend, self.accelerator = recipe, task, backend, accelerator
        self.sampling = Sampling.from_recipe(recipe.rollout)
        self.flight: Any = None  # those of the next step, on their way
        self.ahead: list[list[Completion]] | None = None  # or here already

    def take(
        self, step: int, prompts: list[Prompt], on_group: Callable[[Group], None], *, before: Sequence[Prompt] = ()
    ) -> list[Group]:
        """This process's share of the groups of ``prompts``; with overlap, those of the next step are asked for before
        this returns, in the order of the data.

        ``on_group`` is called once with each, in the order in which they end, while others are still sampled.
        ``before`` are the prompts that this step has already sampled.
        """
        requests = self._requests(step, prompts, before)
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
            following = self._requests(step + 1, self.task.train_prompts(step + 1))
            self.flight = overlapping.submit(following, self.sampling, step)
        for place in range(len(requests)):
            if place not in groups:
                ended(place, completions[place])
        return [groups[place] for place in range(len(requests))]

    def state(self) -> Rows | None:
        """What is ahead, of all processes, for a checkpoint; waits until it is whole. Called by all processes."""
        self._land()
        if self.ahead is None:
            return None
        return gather_object([row_of(completion) for group in self.ahead for completion in group])

    def restore(self, state: Rows | None) -> None:
        """Inverse of ``state``, for a run that goes on behind the same step."""
        if state is None:
            return
        G, rank = self.recipe.rollout.num_generations, self.accelerator.process_index
        size = self.recipe.training.prompts_per_step // self.accelerator.num_processes
        completions = [completion_of(row) for row in state[rank * size * G : (rank + 1) * size * G]]
        self.ahead = [completions[g : g + G] for g in range(0, len(completions), G)]

    def _land(self) -> None:
        if self.flight is not None:
            self.ahead, self.flight = cast(OverlappingBackend, self.backend).collect(self.flight), None

    def _requests(self, step: int, prompts: Sequence[Prompt], before: Sequence[Prompt] = ()) -> list[Request]:
        requests = rollout_requests(self.recipe, [*before, *prompts], step)[len(before) :]
        return share_of(requests, self.accelerator)


def row_of(completion: Completion) -> dict[str, Any]:
    """A completion as plain values, which a checkpoint can hold."""
    return {**asdict(completion), "status": completion.status.value}


def completion_of(row: dict[str, Any]) -> Completion:
    """Inverse of ``row_of``."""
    versions = [VersionSpan(**span) for span in row["versions"]]
    return Completion(**{**row, "status": Status(row["status"]), "versions": versions})


def rollout_requests(recipe: Recipe, prompts: Sequence[Prompt], step: int) -> list[Request]:
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
    """This process's prompts: a contiguous piece, so that gathering restores the order. Where they do not divide by the
    processes (a step's later rounds of drawing), pieces differ by one, and one may be empty."""
    bounds = [len(requests) * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    return requests[bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]
