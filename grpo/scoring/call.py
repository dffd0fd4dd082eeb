"""A reward function inside a worker: finding it, what its signature asks for, and one call of it.

Standard library and ``grpo.types`` only, like all of the worker. What a call answers is plain values, so that JSON can
hold it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grpo import user_code
from grpo.errors import UserError
from grpo.scoring.messages import Answer, BrokenContract, Failure, Outcome, Request, Signature
from grpo.types import REWARD_KEYWORDS

OWN_FOLDER = str(Path(__file__).parent)  # frames of its files say nothing to a user


@dataclass(frozen=True)
class FunctionSpec:
    """Where a reward function is (``module``: a dotted name or, of the user's own, a file; empty for what an
    environment paid) and how to call it."""

    key: str  # its name in metrics
    source: str  # as the recipe has it
    module: str
    attribute: str
    args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 10.0
    builtin: bool = False
    where: str = "rewards"  # its key in the recipe

    @property
    def is_paid(self) -> bool:
        """Is it what the environment paid? Then there is nothing to call."""
        return not self.module


class LoadError(Exception):
    """A reward function cannot be had; the message names the file and the cause."""


class ContractError(Exception):
    """A reward function broke its contract (wrong length or type): a bug in it, not a bad completion."""


class RewardFunction:
    """A loaded reward function and what its signature asks for.

    A function that takes no ``**kwargs`` gets only the arguments that it names.

    Raises:
        LoadError: it cannot be imported, is no function, or does not take the recipe's ``args``.
    """

    def __init__(self, spec: FunctionSpec) -> None:
        self.spec = spec
        self.fn = _load(spec)
        is_async = inspect.iscoroutinefunction(self.fn) or inspect.iscoroutinefunction(
            getattr(self.fn, "__call__", None)  # noqa: B004 - its method, not whether it has one
        )
        try:
            parameters = inspect.signature(self.fn).parameters.values()
        except (TypeError, ValueError) as why:
            raise LoadError(f"{spec.attribute!r} has no signature: {why}") from None
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.accepts = named
        wants_ids = "completion_ids" in named or (self.takes_all and not spec.builtin)
        required = {p.name for p in parameters if p.name in named and p.default is p.empty}
        self.signature = Signature(is_async, wants_ids, sorted(required - REWARD_KEYWORDS - spec.args.keys()))
        unknown = spec.args.keys() - named
        if unknown and (spec.builtin or not self.takes_all):
            known = sorted(named - REWARD_KEYWORDS)
            raise LoadError(f"args: it takes no {', '.join(sorted(unknown))} (it takes: {', '.join(known) or 'none'})")

    def filtered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.takes_all else {key: value for key, value in kwargs.items() if key in self.accepts}


def _load(spec: FunctionSpec) -> Callable[..., Any]:
    if spec.builtin:
        return getattr(importlib.import_module(spec.module), spec.attribute)
    try:
        fn = user_code.load(f"{spec.module}:{spec.attribute}")
    except UserError as why:
        out_of_memory = re.search("MemoryError|failed to map|annot allocate memory", str(why))
        hint = " (raise scoring.memory_limit_gb, or set it to null)" if out_of_memory else ""
        raise LoadError(f"{why}{hint}") from why
    if not callable(fn) or inspect.isclass(fn):
        raise LoadError(f"{spec.attribute!r} in {spec.module} is no function but {fn!r}")
    return fn


class Call:
    """One call of a function: its arguments, what it logs while it runs, and what comes of it."""

    def __init__(self, function: RewardFunction, request: Request, state: SimpleNamespace) -> None:
        self.function = function
        self.request = request
        self.state = state
        self.n = len(request.completions)
        self.metrics: dict[str, list[float]] = {}
        self.columns: dict[str, list[Any]] = {}
        self.verdicts: list[str] = []
        self.details: list[str] = []

    def run(self, wait_for: Callable[[Awaitable[Any]], Any] | None = None) -> Outcome:
        """Call a plain function. ``wait_for`` awaits what it returns where that is an awaitable nevertheless."""
        try:
            result = self.start()
            if inspect.isawaitable(result):
                assert wait_for is not None, "a function that is run without an event loop returned an awaitable"
                result = wait_for(result)
            return self.answer(result)
        except BaseException as why:
            return outcome_of(why)

    def start(self) -> Any:
        """Call the function. It returns the rewards, or an awaitable of them; it raises what it likes."""
        request, n = self.request, self.n
        # A user's function may change what it is given (nums.remove(…)); each completion gets its own copy of the row.
        copies = 1 if self.function.spec.builtin else n
        rows = [pickle.loads(request.row) for _ in range(copies)] * (n // copies)
        offered = {
            **{column: [columns[column] for _, columns in rows] for column in rows[0][1]},
            **self.function.spec.args,
            "prompts": [prompt for prompt, _ in rows],
            "completions": request.completions,
            "completion_ids": request.completion_ids,
            "status": request.status,
            "prefill": [request.prefill] * n,
            "trainer_state": self.state,
            "log_extra": self.log_extra,
            "log_metric": self.log_metric,
            "log_verdict": self.log_verdict,
        }
        return self.function.fn(**self.function.filtered(offered))

    def answer(self, result: Any) -> Answer:
        """The function's answer, with what it logged. Raises ContractError where its result is no list of rewards."""
        values = self._one_each(result, "returned")
        rewards = [None if value is None else _number(value, "returned a list with") for value in values]
        return Answer(rewards, self.verdicts, self.details, self.metrics, self.columns)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(str(name), []).append(_number(value, f"log_metric({name!r}) got"))

    def log_extra(self, column: str, values: Any) -> None:
        values = self._one_each(values, f"log_extra({column!r}) got")
        self.columns[str(column)] = [_plain(value) for value in values]

    def log_verdict(self, verdicts: Any) -> None:
        """Why each completion got its reward: a short word, or anything with ``outcome`` and ``detail``."""
        verdicts = self._one_each(verdicts, "log_verdict got")
        outcomes = [getattr(verdict, "outcome", verdict) for verdict in verdicts]
        self.verdicts = [str(getattr(outcome, "value", outcome)) for outcome in outcomes]
        self.details = [str(getattr(verdict, "detail", "")) for verdict in verdicts]

    def _one_each(self, values: Any, did: str) -> list[Any]:
        expected = f"expected a list with one entry for each of the {self.n} completions"
        is_scalar = getattr(values, "ndim", None) == 0  # an array or tensor of one number says that it can be iterated
        if is_scalar or isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
            raise ContractError(f"{did} {_brief(values)}; {expected}")
        values = list(values)
        if len(values) != self.n:
            raise ContractError(f"{did} {len(values)} values ({_brief(values)}); {expected}")
        return values


def outcome_of(why: BaseException) -> Failure | BrokenContract:
    """What comes of a call that raised. The failure's message is the end of its traceback, from the function on."""
    if isinstance(why, ContractError):
        return BrokenContract(str(why))
    # After a MemoryError the heap is full of holes.
    return Failure("error", user_code.traceback_of(why, OWN_FOLDER), restart=isinstance(why, MemoryError))


def _number(value: Any, did: str) -> float:
    number = user_code.as_number(value)
    if number is None:
        raise ContractError(f"{did} {_brief(value)}; expected numbers, or None where a completion cannot be scored")
    return number


def _plain(value: Any) -> Any:
    """The value as JSON can hold it, so that rollout files show columns as they are. Other kinds become their repr."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
