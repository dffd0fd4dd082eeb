"""A backend of the user's own (``rollout.backend: my_backend.py:MyBackend``): loaded, and checked at every call.

It is a class (or a function that makes one) called with ``(policy, rollout)``: the policy, and the recipe's ``rollout``
section. What it must be able to do is ``base.Backend``, and with ``rollout.max_staleness`` above 0
``base.OverlappingBackend``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpo import user_code
from grpo.backends.base import Backend, OnGroup, Request, Sampling
from grpo.config import RolloutConfig
from grpo.errors import RunError, UserError
from grpo.types import Completion, Status

if TYPE_CHECKING:
    from grpo.model.policy import Policy

METHODS: dict[str, tuple[str, ...]] = {
    "generate": ("requests", "sampling", "version", "on_group"),
    "sync": ("policy", "version"),
    "close": (),
}
OVERLAPPING: dict[str, tuple[str, ...]] = {"submit": ("requests", "sampling", "version"), "collect": ("flight",)}


def load_backend(rollout: RolloutConfig) -> Callable[[Policy, RolloutConfig], Backend]:
    """What ``rollout.backend`` names, before any model is loaded.

    Raises:
        UserError: it cannot be imported, lacks a method, or takes other arguments.
    """
    what = f"rollout.backend: {rollout.backend}"
    make = user_code.load(rollout.backend, "rollout.backend")
    if not callable(make):
        raise UserError(f"{what} is {user_code.brief(make)}; expected a class with {', '.join(METHODS)}")
    user_code.must_take(make, ("policy", "rollout"), what)
    if inspect.isclass(make):
        _check_methods(make, rollout, what, ("self",))
    return make


def make_own_backend(policy: Policy, rollout: RolloutConfig) -> CheckedBackend:
    """Make it, holding no weights yet. Raises UserError where it lacks a method."""
    what = f"rollout.backend: {rollout.backend}"
    make = load_backend(rollout)
    with user_code.Calls(what).call():
        backend = make(policy, rollout)
    _check_methods(backend, rollout, what, ())
    return CheckedBackend(backend, what, frozenset(policy.stop_token_ids))


def _check_methods(backend: Any, rollout: RolloutConfig, what: str, first: tuple[str, ...]) -> None:
    needed = METHODS | (OVERLAPPING if rollout.max_staleness else {})
    missing = [name for name in needed if not callable(getattr(backend, name, None))]
    if missing:
        why = " (rollout.max_staleness needs submit and collect)" if set(missing) & set(OVERLAPPING) else ""
        raise UserError(f"{what} has no {' and no '.join(missing)}; a backend has {', '.join(needed)}{why}")
    for name, arguments in needed.items():
        user_code.must_take(getattr(backend, name), (*first, *arguments), f"{what}: {name}")


class CheckedBackend:
    """A backend of the user's own. What it returns is checked, told in a line where it is wrong, and not trained on."""

    def __init__(self, backend: Any, what: str, stop_token_ids: frozenset[int]) -> None:
        self.backend = backend
        self.stop_token_ids = stop_token_ids
        self._making = user_code.Calls(f"{what}: generate")
        self._submitting = user_code.Calls(f"{what}: submit")
        self._collecting = user_code.Calls(f"{what}: collect")
        self._syncing = user_code.Calls(f"{what}: sync")

    def generate(
        self, requests: list[Request], sampling: Sampling, version: int, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        def on_checked_group(place: int, completions: list[Completion]) -> None:
            self._check([completions], requests[place : place + 1], sampling, version)
            if on_group is not None:
                on_group(place, completions)

        with self._making.call():
            groups = self.backend.generate(requests, sampling, version, on_checked_group)
            self._check(groups, requests, sampling, version)
        return groups

    def _check(self, groups: Any, requests: list[Request], sampling: Sampling, version: int) -> None:
        if problem := wrong_groups(groups, requests, sampling, self.stop_token_ids):
            raise self._making.error(problem)
        others = {span.version for group in groups for c in group for span in c.versions} - {version}
        if others:
            raise RunError(f"{self._making.what}: asked for policy version {version}, it sampled from {min(others)}")

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        with self._syncing.call():
            metrics = self.backend.sync(policy, version)
            numbers = isinstance(metrics, dict) and all(isinstance(v, (int, float)) for v in metrics.values())
            if not numbers:
                raise self._syncing.error(
                    f"it returned {user_code.brief(metrics)}; expected a dict of metrics by name, such as {{}}"
                )
        return {f"backend/{name}": value for name, value in metrics.items()}  # no name of the trainer's begins so

    def submit(self, requests: list[Request], sampling: Sampling, version: int) -> Any:
        with self._submitting.call():
            return requests, sampling, self.backend.submit(requests, sampling, version)

    def collect(self, flight: Any, on_group: OnGroup | None = None) -> list[list[Completion]]:
        requests, sampling, flying = flight
        with self._collecting.call():
            groups = self.backend.collect(flying)
            if problem := wrong_groups(groups, requests, sampling, self.stop_token_ids):
                raise self._collecting.error(problem)
        return groups

    def close(self) -> None:
        self.backend.close()


def wrong_groups(
    groups: Any, requests: list[Request], sampling: Sampling, stop_token_ids: frozenset[int]
) -> str | None:
    """What is wrong with completions for these requests, if anything: how many there are, and what each holds."""
    wanted = [len(request.keys) for request in requests]
    if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
        return (
            f"it returned {user_code.brief(groups)}; expected a list of completions for each of {len(wanted)} requests"
        )
    if [len(group) for group in groups] != wanted:
        return (
            f"it returned {_numbers([len(group) for group in groups])} completions; expected one for each key of the "
            f"{len(wanted)} requests: {_numbers(wanted)}"
        )
    for request, group in zip(requests, groups, strict=True):
        for sample, completion in enumerate(group):
            if problem := _wrong_completion(completion, sampling, stop_token_ids):
                return f"prompt {request.prompt.id}, completion {sample}: {problem}"
    return None


def _wrong_completion(completion: Any, sampling: Sampling, stop_token_ids: frozenset[int]) -> str | None:
    if not isinstance(completion, Completion):
        return f"it is {user_code.brief(completion)}; expected a grpo.types.Completion"
    if not isinstance(completion.status, Status):
        return f"its status is {user_code.brief(completion.status)}; expected a grpo.types.Status"
    tokens, logprobs = completion.token_ids, completion.sampler_logprobs
    if len(tokens) != len(logprobs):
        return f"it has {len(tokens)} token_ids and {len(logprobs)} sampler_logprobs; expected one for each token"
    if not tokens and completion.status is not Status.ERROR:
        return "it has no token, the end-of-sequence token included; expected one at least, or Status.ERROR"
    if len(tokens) > sampling.max_completion_length:
        return f"it has {len(tokens)} tokens, more than max_completion_length ({sampling.max_completion_length})"
    if not all(isinstance(token, int) for token in tokens):
        return "its token_ids are not all integers"
    ends = [place for place, token in enumerate(tokens[:-1]) if token in stop_token_ids]
    if ends:
        return (
            f"it goes on behind token {ends[0]}, which is {tokens[ends[0]]}, an end-of-sequence token; cut it there "
            "(is that padding?)"
        )
    if not all(isinstance(p, float) and math.isfinite(p) and p < 1e-3 for p in logprobs):
        return "its sampler_logprobs are not all finite floats of at most 0, the natural logarithms of probabilities"
    spans = sorted((span.start, span.end) for span in completion.versions)
    bounds = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != bounds[:-1] or bounds[-1] != len(tokens):
        return f"its versions do not cover its {len(tokens)} tokens; expected VersionSpan(0, {len(tokens)}, version)"
    return None


def _numbers(counts: list[int]) -> str:
    text = " + ".join(map(str, counts[:4]))
    return f"{text} + ..." if len(counts) > 4 else text or "0"
