"""A reward function inside a worker: finding it, what its signature asks for, and one call of it.

Standard library and ``grpo.types`` only, like all of the worker. What a call answers is plain values alone, for JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import math
import pickle
import re
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grpo.types import REWARD_KEYWORDS

MAX_TRACEBACK = 4000


@dataclass(frozen=True)
class FunctionSpec:
    """Where a reward function is (``file``, or else ``module``, and ``attribute`` in there) and how to call it."""

    key: str  # its name in metrics
    source: str  # as the recipe has it
    attribute: str
    module: str = ""
    file: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 10.0
    builtin: bool = False


class LoadError(Exception):
    """A reward function cannot be had; the message names the file and the cause."""


class ContractError(Exception):
    """A reward function broke its contract (wrong length or type): a bug in it, not a bad completion."""


class RewardFunction:
    """A loaded reward function and what its signature asks for.

    ``needs`` are the columns it cannot be called without. A function that takes no ``**kwargs`` gets what it names.

    Raises:
        LoadError: it cannot be imported, is no function, or does not take the recipe's ``args``.
    """

    def __init__(self, spec: FunctionSpec) -> None:
        self.spec = spec
        self.fn = _load(spec)
        self.is_async = inspect.iscoroutinefunction(self.fn) or inspect.iscoroutinefunction(
            getattr(self.fn, "__call__", None)  # noqa: B004 - its method, not whether it has one
        )
        try:
            parameters = inspect.signature(self.fn).parameters.values()
        except (TypeError, ValueError) as why:
            raise LoadError(f"{spec.attribute!r} has no signature: {why}") from None
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.accepts = named
        self.wants_ids = "completion_ids" in named or (self.takes_all and not spec.builtin)
        required = {p.name for p in parameters if p.name in named and p.default is p.empty}
        self.needs = sorted(required - REWARD_KEYWORDS - spec.args.keys())
        unknown = spec.args.keys() - named
        if unknown and (spec.builtin or not self.takes_all):
            known = sorted(named - REWARD_KEYWORDS)
            raise LoadError(f"args: it takes no {', '.join(sorted(unknown))} (it takes: {', '.join(known) or 'none'})")

    def filtered(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs if self.takes_all else {key: value for key, value in kwargs.items() if key in self.accepts}


def _load(spec: FunctionSpec) -> Callable[..., Any]:
    try:
        module = _load_file(Path(spec.file)) if spec.file else importlib.import_module(spec.module)
    except BaseException as why:  # a user's module may do anything, SystemExit included
        raise LoadError(_import_failure(why, spec.file)) from why
    where = spec.file or module.__name__
    try:
        fn = getattr(module, spec.attribute)
    except AttributeError:
        functions = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_"))
        raise LoadError(
            f"{where} has no {spec.attribute!r} (it has: {', '.join(functions) or 'no function'})"
        ) from None
    if not callable(fn) or inspect.isclass(fn):
        raise LoadError(f"{spec.attribute!r} in {where} is no function but {fn!r}")
    return fn


def _load_file(path: Path) -> Any:
    name = "_reward_file" + re.sub(r"\W", "_", str(path))  # never the name of a module that is already there
    if name in sys.modules:
        return sys.modules[name]
    sys.path.append(str(path.parent))  # its neighbours can be imported, and shadow nothing
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_failure(why: BaseException, file: str) -> str:
    """One line: where in the user's file (or, failing that, anywhere) the import stopped, and what it was."""
    what = "".join(traceback.format_exception_only(type(why), why)).strip().splitlines()[-1]
    if isinstance(why, MemoryError) or re.search("failed to map|annot allocate memory", what):
        what += " (raise scoring.memory_limit_gb, or set it to null)"
    if isinstance(why, SyntaxError):
        return f"{why.filename}:{why.lineno}: {what}"
    frames = [f for f in traceback.extract_tb(why.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if f.filename == file] or [f for f in frames if f.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {what}" if frames else what


class Call:
    """One call of a function: its arguments, what it logs while it runs, and the message that answers it."""

    def __init__(self, function: RewardFunction, payload: dict[str, Any], state: SimpleNamespace) -> None:
        self.function = function
        self.payload = payload
        self.state = state
        self.n = len(payload["completions"])
        self.metrics: list[tuple[str, float]] = []
        self.columns: dict[str, list[Any]] = {}
        self.verdicts: list[tuple[str, str]] | None = None

    def run(self, loop: asyncio.AbstractEventLoop | None = None) -> dict[str, Any]:
        """The answer of a plain function; ``loop`` awaits what one returns that is not declared async."""
        try:
            result = self.function.fn(**self._kwargs())
            if inspect.isawaitable(result):
                assert loop is not None, "a function that is run without an event loop returned an awaitable"
                result = loop.run_until_complete(_awaited(result))
            return self._answer(result)
        except BaseException as why:
            return _failure(why)

    async def run_async(self, timeout: float) -> dict[str, Any]:
        try:
            coroutine = self.function.fn(**self._kwargs())
        except BaseException as why:
            return _failure(why)
        task = asyncio.ensure_future(self._guarded(coroutine))
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if done:
            return task.result()
        stack = _await_stack(coroutine)
        task.cancel()
        await asyncio.wait({task}, timeout=0.5)
        return {"failure": "timeout", "message": f"no result after {timeout:g} s, awaiting at:\n{stack}"}

    async def _guarded(self, coroutine: Awaitable[Any]) -> dict[str, Any]:
        try:  # here, and not around the task: a SystemExit in a task would end the event loop
            return self._answer(await coroutine)
        except BaseException as why:
            return _failure(why)

    def _kwargs(self) -> dict[str, Any]:
        payload, n = self.payload, self.n
        row_bytes, builtin = payload["row"], self.function.spec.builtin
        # A user's function may change what it is given (nums.remove(…)); each completion gets its own copy of the row.
        rows = [pickle.loads(row_bytes)] * n if builtin else [pickle.loads(row_bytes) for _ in range(n)]
        return self.function.filtered(
            {
                **{column: [columns[column] for _, columns in rows] for column in rows[0][1]},
                **self.function.spec.args,
                "prompts": [prompt for prompt, _ in rows],
                "completions": payload["completions"],
                "completion_ids": payload["completion_ids"],
                "status": payload["status"],
                "prefill": [payload["prefill"]] * n,
                "trainer_state": self.state,
                "log_extra": self.log_extra,
                "log_metric": self.log_metric,
                "log_verdict": self.log_verdict,
            }
        )

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((str(name), _number(value, f"log_metric({name!r}) got")))

    def log_extra(self, column: str, values: Any) -> None:
        values = self._one_each(values, f"log_extra({column!r}) got")
        self.columns[str(column)] = [_plain(value) for value in values]

    def log_verdict(self, verdicts: Any) -> None:
        """Why each completion got its reward: a short word, or anything with ``outcome`` and ``detail``."""
        verdicts = self._one_each(verdicts, "log_verdict got")
        outcomes = [getattr(verdict, "outcome", verdict) for verdict in verdicts]
        self.verdicts = [
            (str(getattr(outcome, "value", outcome)), str(getattr(verdict, "detail", "")))
            for outcome, verdict in zip(outcomes, verdicts, strict=True)
        ]

    def _answer(self, result: Any) -> dict[str, Any]:
        values = self._one_each(result, "returned")
        rewards = [None if value is None else _number(value, "returned a list with") for value in values]
        not_finite = [i for i, reward in enumerate(rewards) if reward is not None and not math.isfinite(reward)]
        return {
            "rewards": [None if i in not_finite else reward for i, reward in enumerate(rewards)],
            "not_finite": [(i, str(rewards[i])) for i in not_finite],
            "verdicts": self.verdicts,
            "metrics": self.metrics,
            "columns": self.columns,
        }

    def _one_each(self, values: Any, did: str) -> list[Any]:
        expected = f"expected a list with one entry for each of the {self.n} completions"
        if isinstance(values, (str, bytes, dict)) or not hasattr(values, "__iter__"):
            raise ContractError(f"{did} {_brief(values)}; {expected}")
        values = list(values)
        if len(values) != self.n:
            raise ContractError(f"{did} {len(values)} values ({_brief(values)}); {expected}")
        return values


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _failure(why: BaseException) -> dict[str, Any]:
    if isinstance(why, ContractError):
        return {"broken": str(why)}
    if why.__traceback__ is not None:
        why.__traceback__ = why.__traceback__.tb_next  # the first frame is this file's
    text = "".join(traceback.format_exception(type(why), why, why.__traceback__, limit=-20))
    # After a MemoryError the heap is full of holes: the process says so, and is replaced.
    return {"failure": "error", "message": text[-MAX_TRACEBACK:], "restart": isinstance(why, MemoryError)}


def _await_stack(coroutine: Any) -> str:
    lines = []
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        lines.append(f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_name}')
        coroutine = coroutine.cr_await
    return "\n".join(lines)


def _number(value: Any, did: str) -> float:
    """A float from what counts as a number: int, float, bool, a numpy scalar, a tensor of one element."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            value = value.item()
    if not isinstance(value, (int, float)):
        raise ContractError(f"{did} {_brief(value)}; expected numbers, or None where a completion cannot be scored")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _plain(value: Any) -> Any:
    """What JSON can hold, so that columns end up in rollout files as they are; anything else as its repr."""
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
