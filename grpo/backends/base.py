"""What the trainer asks of anything that generates: two verbs, ``generate`` and ``sync``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from grpo.config import RolloutConfig
from grpo.types import Completion, Prompt

if TYPE_CHECKING:
    from grpo.model.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """The distribution that completions are drawn from. ``temperature`` 0 is greedy (evaluation only)."""

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    stop: list[str] = field(default_factory=list)

    @classmethod
    def from_recipe(cls, rollout: RolloutConfig) -> Sampling:
        return cls(
            max_completion_length=rollout.max_completion_length,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            stop=rollout.stop,
        )


@dataclass(frozen=True)
class Request:
    """A prompt and one 64-bit key for each completion wanted; the key alone seeds that completion's draws."""

    prompt: Prompt
    keys: list[int]


OnGroup = Callable[[int, list[Completion]], None]
"""Called with a request's place and its completions as soon as the last of them has ended, while others go on. A
backend that cannot tell need not call it."""


class Backend(Protocol):
    """A rollout backend. One instance a process; every process generates for its own share of the prompts."""

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """One completion a key, in the order of requests and keys, sampled from policy ``version``.

        Raises RunError, naming both, where the weights it holds are of another version.
        """
        ...

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        """Take over the policy's weights, which are from now on those of ``version``. Called by every process.

        Returns metrics of the hand-over, by name. Raises BackendFailed on every process where it cannot.
        """
        ...

    def close(self) -> None: ...


class OverlappingBackend(Backend, Protocol):
    """A backend that samples while the policy trains (``rollout.overlap``)."""

    def submit(self, requests: list[Request], sampling: Sampling, version: int) -> Any:
        """Ask for completions of policy ``version`` and return at once, with what ``collect`` takes."""
        ...

    def collect(self, flight: Any) -> list[list[Completion]]:
        """Wait for them. What was in flight during a sync was finished by the new weights and says so."""
        ...
