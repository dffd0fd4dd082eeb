"""Where a step's completions come from: sampled when the step needs them, or one step ahead while another trains.

With ``rollout.overlap`` the completions of step k + 1 are requested from policy k while that policy is trained on step
k. If new weights arrive meanwhile, completions in flight go on under them; each completion says which versions made it.
Completions that are ahead belong to the run's state: a checkpoint waits for them and holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from grpo.backends.base import Backend, OverlappingBackend, Request, Sampling
from grpo.config import RolloutConfig, TrainingConfig
from grpo.randomness import Stream, key
from grpo.types import Completion, Group, Prompt

if TYPE_CHECKING:
    from grpo.prompts.task import Task


class Rollouts:
    """Samples the groups of each step: this process's share of them, not yet scored."""

    def __init__(
        self,
        config: RolloutConfig,
        training: TrainingConfig,
        task: Task,
        backend: Backend,
        accelerator: Accelerator,
    ):
        self.config, self.training = config, training
        self.task, self.backend, self.accelerator = task, backend, accelerator
        self.sampling = Sampling.from_recipe(config)
        self.flight: Any = None  # the next step's completions, while they are sampled
        self.ahead: list[list[Completion]] | None = None  # the same, once they have ended

    def take(
        self, step: int, prompts: list[Prompt], on_group: Callable[[Group], None], *, before: Sequence[Prompt] = ()
    ) -> list[Group]:
        """This process's share of the groups of ``prompts``. With overlap, the next step's completions are requested
        before this returns.

        ``on_group`` is called once with each group, in the order in which they end, while others are still sampled.
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
        if self.config.overlap and step + 1 < self.training.max_steps:
            overlapping = cast(OverlappingBackend, self.backend)
            following = self._requests(step + 1, self.task.train_prompts(step + 1))
            self.flight = overlapping.submit(following, self.sampling, step)
        for place in range(len(requests)):
            if place not in groups:
                ended(place, completions[place])
        return [groups[place] for place in range(len(requests))]

    def state(self) -> list[dict[str, Any]] | None:
        """The completions that are ahead, of all processes, for a checkpoint; None without any.

        Waits until they have all ended. Every process must call this.
        """
        self._land()
        if self.ahead is None:
            return None
        return gather_object([completion.to_dict() for group in self.ahead for completion in group])

    def restore(self, state: list[dict[str, Any]] | None) -> None:
        """Inverse of ``state``, for a run that resumes after the same step."""
        if state is None:
            return
        G, rank = self.config.num_generations, self.accelerator.process_index
        size = self.training.prompts_per_step // self.accelerator.num_processes
        completions = [Completion.from_dict(values) for values in state[rank * size * G : (rank + 1) * size * G]]
        self.ahead = [completions[g : g + G] for g in range(0, len(completions), G)]

    def _land(self) -> None:
        if self.flight is not None:
            self.ahead, self.flight = cast(OverlappingBackend, self.backend).collect(self.flight), None

    def _requests(self, step: int, prompts: Sequence[Prompt], before: Sequence[Prompt] = ()) -> list[Request]:
        G, seed = self.config.num_generations, self.training.seed
        requests = rollout_requests([*before, *prompts], step, num_generations=G, seed=seed)[len(before) :]
        return share_of(requests, self.accelerator)


def rollout_requests(prompts: Sequence[Prompt], step: int, *, num_generations: int, seed: int) -> list[Request]:
    """A request for each prompt of a step; a completion's key is made of (seed, step, prompt, sample).

    A prompt that comes twice in a step gets fresh samples.
    """
    G = num_generations
    seen: dict[int, int] = {}
    requests = []
    for prompt in prompts:
        first = seen.get(prompt.id, 0)
        seen[prompt.id] = first + G
        keys = [key(seed, Stream.ROLLOUT.value, step, prompt.id, g) for g in range(first, first + G)]
        requests.append(Request(prompt, keys))
    return requests


def share_of(requests: list[Request], accelerator: Accelerator) -> list[Request]:
    """This process's requests: a contiguous piece, so that gathering the pieces restores the order.

    The number of requests may not divide by the processes (in a step's later rounds of drawing). Then the pieces'
    sizes differ by one, and a piece may be empty.
    """
    bounds = [len(requests) * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    return requests[bounds[accelerator.process_index] : bounds[accelerator.process_index + 1]]
