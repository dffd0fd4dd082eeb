"""The protocol of rollout backends: ``generate`` samples completions, ``sync`` takes over weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
    """A prompt, and one 64-bit key for each completion wanted. The key alone seeds the draws of its completion."""

    prompt: Prompt
    keys: list[int]


OnGroup = Callable[[int, list[Completion]], None]
"""A backend calls it with a request's place and its completions, as soon as the last of them has ended and while other
requests go on. A backend that cannot tell need not call it."""


Place = tuple[int, int]
"""A completion's request and sample, both by their places."""


class Turns(Protocol):
    """What answers the model between its turns (``grpo.environments``).

    A turn ends at a stop token, at one of ``Sampling.stop`` or ``stop``, or at a limit: ``max_turn_length`` of the
    turn's tokens, or ``Sampling.max_completion_length`` of all tokens of the episode that the model drew. Stop strings
    are looked for in the turn's own tokens alone.
    """

    stop: Sequence[str]
    max_turn_length: int | None
    max_environment_tokens: int
    """Most tokens that it adds to one episode, all replies together. A cache has room for them."""
    overlap_steps: int
    """For the hf backend: how many decoding steps others make at least, and twice as many at most, before they wait for
    a reply. Counted in steps and not in seconds, because who is decoded together decides how numbers are rounded, and a
    resumed run must round alike."""

    def answer(
        self, place: Place, token_ids: Sequence[int], start: int, ended: str, *, last: bool
    ) -> Future[list[int] | None]:
        """A turn of ``place`` is over: ``token_ids`` are all of the completion's so far, those from ``start`` on are
        the turn's. ``ended``: ``stop`` or ``length``. Returns at once, whatever the thread that calls it.
        ``token_ids`` grows when the future has its result.

        The future gives the token ids that follow, after which the model goes on, or None where the episode is over. It
        always ends, within the environment's time limit, and never raises but for RunError. ``last``: the episode's
        limit is used up, so None will come.
        """
        ...


class Backend(Protocol):
    """A rollout backend. One instance a process; every process generates for its own share of the prompts.

    One that holds memory which an update could use may also have ``rest()``. It is called on every process after a
    step's rollouts, and nothing is asked for between it and the next ``sync``.
    """

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        version: int,
        on_group: OnGroup | None = None,
        turns: Turns | None = None,
    ) -> list[list[Completion]]:
        """One completion for each key, in the order of requests and keys, sampled from policy ``version``.

        With ``turns`` a completion is an episode: turns of the model and, between them, what ``turns`` answers. Its
        ``episode`` stays None; who gave ``turns`` fills it in.

        Raises:
            RunError: the backend holds another version. The message names both.
        """
        ...

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        """Take over the policy's weights as those of ``version``. Every process calls it.

        Returns metrics of the hand-over, by name. Those of a backend of the user's own are logged as ``backend/NAME``.

        Raises:
            BackendFailed: it cannot. Raised on every process.
        """
        ...

    def close(self) -> None: ...


class OverlappingBackend(Backend, Protocol):
    """A backend that samples while the policy trains (``rollout.max_staleness``).

    Several flights may be open at once. They are collected in the order in which they were submitted, each once.
    ``generate`` may be called meanwhile, for an evaluation, and so may ``sync``.
    """

    def submit(self, requests: list[Request], sampling: Sampling, version: int, turns: Turns | None = None) -> Any:
        """Ask for completions of policy ``version`` and return at once, with what ``collect`` takes. ``turns`` as in
        ``generate``; it is asked until the completions are collected."""
        ...

    def collect(self, flight: Any, on_group: OnGroup | None = None) -> list[list[Completion]]:
        """Wait for the completions. Those in flight during a sync were finished by the new weights, and say so. A
        backend of the user's own is called with the flight alone."""
        ...
