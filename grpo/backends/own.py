"""A backend of the user's own (``rollout.backend: my_backend.py:MyBackend``): loaded, and checked at every call.

It is a class (or a function that makes one) called with ``(policy, rollout)``: the policy, and the recipe's ``rollout``
section. What it must be able to do is ``base.Backend``, and with ``rollout.max_staleness`` above 0
``base.OverlappingBackend``. With an environment ``generate`` and ``submit`` are called with ``turns=…``, else without.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from grpo import user_code
from grpo.backends.base import Backend, OnGroup, Place, Request, Sampling, Turns
from grpo.config import Recipe, RolloutConfig
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


def load_backend(recipe: Recipe) -> Callable[[Policy, RolloutConfig], Backend]:
    """What ``rollout.backend`` names, before any model is loaded.

    Raises:
        UserError: it cannot be imported, lacks a method, or takes other arguments.
    """
    rollout = recipe.rollout
    what = f"rollout.backend: {rollout.backend}"
    make = user_code.load(rollout.backend, "rollout.backend")
    if not callable(make):
        raise UserError(f"{what} is {user_code.brief(make)}; expected a class with {', '.join(METHODS)}")
    user_code.must_take(make, ("policy", "rollout"), what)
    if inspect.isclass(make):
        _check_methods(make, recipe, what, ("self",))
    return make


def make_own_backend(policy: Policy, recipe: Recipe) -> CheckedBackend:
    """Make it, holding no weights yet. Raises UserError where it lacks a method."""
    what = f"rollout.backend: {recipe.rollout.backend}"
    make = load_backend(recipe)
    with user_code.Calls(what).call():
        backend = make(policy, recipe.rollout)
    _check_methods(backend, recipe, what, ())
    return CheckedBackend(backend, what, frozenset(policy.stop_token_ids))


def _check_methods(backend: Any, recipe: Recipe, what: str, first: tuple[str, ...]) -> None:
    overlapping = recipe.rollout.max_staleness > 0
    needed = METHODS | (OVERLAPPING if overlapping else {})
    missing = [name for name in needed if not callable(getattr(backend, name, None))]
    if missing:
        why = " (rollout.max_staleness needs submit and collect)" if set(missing) & set(OVERLAPPING) else ""
        raise UserError(f"{what} has no {' and no '.join(missing)}; a backend has {', '.join(needed)}{why}")
    for name, arguments in needed.items():
        user_code.must_take(getattr(backend, name), (*first, *arguments), f"{what}: {name}")
    if recipe.environment is not None:
        for name in ("generate", "submit") if overlapping else ("generate",):
            _must_take_turns(getattr(backend, name), f"{what}: {name}")


def _must_take_turns(method: Callable[..., Any], what: str) -> None:
    try:
        parameters = inspect.signature(method).parameters.values()
    except (TypeError, ValueError):  # some C functions have none
        return
    if not any(p.name == "turns" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise UserError(
            f"{what} takes no turns, and the recipe has an environment: add an argument turns=None. Where it is given, "
            "draw until a turn ends, call turns.answer(place, token_ids, start, ended, last=last), add the tokens that "
            "its future gives, with sampler_logprobs of 0.0, and go on, until it gives None (grpo.backends.base.Turns)"
        )


class Heard:
    """``Turns`` that hand on, and keep what was asked of each episode: the bounds of its turns, and the answers."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.stop, self.max_turn_length = turns.stop, turns.max_turn_length
        self.max_environment_tokens, self.overlap_steps = turns.max_environment_tokens, turns.overlap_steps
        self.of: defaultdict[Place, list[tuple[int, int, Future[list[int] | None]]]] = defaultdict(list)

    def answer(
        self, place: Place, token_ids: Sequence[int], start: int, ended: str, *, last: bool
    ) -> Future[list[int] | None]:
        reply = self.turns.answer(place, token_ids, start, ended, last=last)
        self.of[place].append((start, len(token_ids), reply))
        return reply


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
        self,
        requests: list[Request],
        sampling: Sampling,
        version: int,
        on_group: OnGroup | None = None,
        turns: Turns | None = None,
    ) -> list[list[Completion]]:
        heard = None if turns is None else Heard(turns)

        def on_checked_group(place: int, completions: list[Completion]) -> None:
            self._check([completions], requests, sampling, version, heard, first=place)
            if on_group is not None:
                on_group(place, completions)

        with self._making.call():
            given = {} if heard is None else {"turns": heard}
            groups = self.backend.generate(requests, sampling, version, on_checked_group, **given)
            self._check(groups, requests, sampling, version, heard)
        return groups

    def _check(
        self,
        groups: Any,
        requests: list[Request],
        sampling: Sampling,
        version: int,
        heard: Heard | None,
        first: int | None = None,
    ) -> None:
        """``first``: the request that a single group is of."""
        asked = requests if first is None else requests[first : first + 1]
        if problem := wrong_groups(groups, asked, sampling, self.stop_token_ids, heard, first or 0):
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

    def submit(self, requests: list[Request], sampling: Sampling, version: int, turns: Turns | None = None) -> Any:
        heard = None if turns is None else Heard(turns)
        with self._submitting.call():
            given = {} if heard is None else {"turns": heard}
            return requests, sampling, heard, self.backend.submit(requests, sampling, version, **given)

    def collect(self, flight: Any, on_group: OnGroup | None = None) -> list[list[Completion]]:
        requests, sampling, heard, flying = flight
        with self._collecting.call():
            groups = self.backend.collect(flying)
            if problem := wrong_groups(groups, requests, sampling, self.stop_token_ids, heard):
                raise self._collecting.error(problem)
        return groups

    def close(self) -> None:
        self.backend.close()


def wrong_groups(
    groups: Any,
    requests: list[Request],
    sampling: Sampling,
    stop_token_ids: frozenset[int],
    heard: Heard | None = None,
    first: int = 0,
) -> str | None:
    """What is wrong with completions for these requests, if anything: how many there are, and what each holds. With an
    environment it was ``heard``, by places that count from ``first``."""
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
    for place, (request, group) in enumerate(zip(requests, groups, strict=True), start=first):
        for sample, completion in enumerate(group):
            problem = _wrong_completion(completion)
            if problem is None and heard is None:
                problem = _wrong_turn(completion.token_ids, sampling, stop_token_ids)
            if problem is None and heard is not None:
                problem = _wrong_episode(completion, heard, (place, sample), sampling, stop_token_ids)
            if problem is not None:
                return f"prompt {request.prompt.id}, completion {sample}: {problem}"
    return None


def _wrong_turn(
    tokens: Sequence[int], sampling: Sampling, stop_token_ids: frozenset[int], start: int = 0
) -> str | None:
    """Of tokens that the model drew in one go, the first of them at ``start``."""
    if len(tokens) > sampling.max_completion_length:
        return f"it has {len(tokens)} tokens, more than max_completion_length ({sampling.max_completion_length})"
    ends = [place for place, token in enumerate(tokens[:-1]) if token in stop_token_ids]
    if ends:
        return (
            f"it goes on behind token {start + ends[0]}, which is {tokens[ends[0]]}, an end-of-sequence token; cut it "
            "there (is that padding?)"
        )
    return None


def _wrong_episode(
    completion: Completion, heard: Heard, place: Place, sampling: Sampling, stop_token_ids: frozenset[int]
) -> str | None:
    """Whether its tokens are turns and, between them, what the environment answered."""
    tokens = completion.token_ids
    if completion.status is Status.ERROR:
        return None
    if place not in heard.of:
        return f"turns.answer was not called for it, at place {place}: it is an episode of an environment"
    at, drawn = 0, 0
    for start, end, reply in heard.of[place]:
        if start != at:
            return f"a turn was said to begin at token {start}; the one before it and its answer end at {at}"
        if problem := _wrong_turn(tokens[start:end], sampling, stop_token_ids, start):
            return problem
        if not reply.done():
            return f"the answer to its turn of tokens {start} to {end} was not waited for"
        answer, drawn = reply.result(), drawn + end - start
        at = end + len(answer or [])
        if list(tokens[end:at]) != list(answer or []):
            return f"its tokens {end} to {at} are not those that the environment answered"
        if answer is None and at != len(tokens):
            return f"it goes on behind token {at}, where the environment ended it"
    if answer is not None:
        return "it ends with an answer of the environment; expected turns until the answer is None"
    if drawn > sampling.max_completion_length:
        most = sampling.max_completion_length
        return f"the model drew {drawn} tokens of it, more than max_completion_length ({most})"
    return None


def _wrong_completion(completion: Any) -> str | None:
    if not isinstance(completion, Completion):
        return f"it is {user_code.brief(completion)}; expected a grpo.types.Completion"
    if not isinstance(completion.status, Status):
        return f"its status is {user_code.brief(completion.status)}; expected a grpo.types.Status"
    tokens, logprobs = completion.token_ids, completion.sampler_logprobs
    if len(tokens) != len(logprobs):
        return f"it has {len(tokens)} token_ids and {len(logprobs)} sampler_logprobs; expected one for each token"
    if not tokens and completion.status is not Status.ERROR:
        return "it has no token, the end-of-sequence token included; expected one at least, or Status.ERROR"
    if not all(isinstance(token, int) for token in tokens):
        return "its token_ids are not all integers"
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
