"""An environment inside its process: found, constructed, and asked what it is. Standard library only.

Two protocols. TRL's class: ``reset(**row) -> str | None``, its other public methods are tools, ``get_reward()`` pays in
the end. And a game's: ``reset(**row)`` and ``step(text) -> (observation, done)`` or ``(observation, reward, done)``,
where every turn of the model goes to ``step``. What has a ``step`` is a game. All methods may be async.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from grpo import user_code
from grpo.environments.schema import NoSchema, schema_of
from grpo.errors import UserError

OWN = ("reset", "get_reward")  # public methods of TRL's class that are no tools


@dataclass(frozen=True)
class Spec:
    """What to load: places as ``file.py:name`` or ``package.module:name``, and the constructor's arguments."""

    source: str  # of the environment, as the recipe has it; empty where there are tools alone
    place: str
    tools: list[str]
    args: dict[str, Any] = field(default_factory=dict)
    builtin: bool = False


@dataclass(frozen=True)
class About:
    """What an environment is. ``tools`` are JSON schemas; a game has none. ``pays``: it has a ``get_reward``. ``needs``
    are the columns without which ``reset`` cannot be called."""

    game: bool
    pays: bool
    tools: list[dict[str, Any]]
    needs: list[str]


class Loaded:
    """The imported code of a spec. Raises UserError where it cannot be imported: every place, with its cause."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.make: Callable[..., Any] | None = None
        self.functions: list[Callable[..., Any]] = []
        problems: list[str] = []
        if spec.place:
            try:
                self.make = user_code.load(spec.place, self.key)
                if not callable(self.make):
                    problems.append(f"{self.key}: {spec.source} is {user_code.brief(self.make)}; expected a class")
            except UserError as why:
                problems.append(str(why))
        for number, place in enumerate(spec.tools):
            try:
                self.functions.append(user_code.load(place, f"environment.tools[{number}]"))
            except UserError as why:
                problems.append(str(why))
        if problems:
            raise UserError("\n".join(problems))

    @property
    def key(self) -> str:
        return "environment.name" if self.spec.builtin else "environment.path"

    def prepare(self) -> None:
        """Make ready what all episodes of a built-in environment share, before the first is forked. Raises UserError
        where it cannot be had."""
        prepare = getattr(self.make, "prepare", None) if self.spec.builtin else None
        if prepare is None:
            return
        if problem := self._wrong_args():
            raise UserError(problem)
        try:
            prepare(**self.spec.args)
        except RuntimeError as why:  # no sandbox, or not with these packages; it says what to do
            raise UserError(f"{self.key}: {why}") from None
        except Exception as why:
            raise UserError(f"environment.args: {user_code.stopped_at(why)}") from None

    def construct(self) -> Any:
        """An instance for one episode; None where there are tools alone."""
        return None if self.make is None else self.make(**self.spec.args)

    def try_out(self) -> About:
        """Construct one and say what it is. Raises UserError: every problem, a line each, with file and line."""
        if self.make is not None and (problem := self._wrong_args()):
            raise UserError(problem)
        try:
            environment = self.construct()
        except BaseException as why:  # a constructor may do anything, SystemExit included
            raise UserError(f"{self.key}: {self.spec.source}: its constructor: {user_code.stopped_at(why)}") from None
        problems = [*self._problems(environment)]
        if problems:
            raise UserError("\n".join(problems))
        kind = type(environment)
        needs = [] if self.make is None else needed(environment.reset)
        game = hasattr(kind, "step")
        tools = {} if game else tools_of(environment, self.functions)
        return About(game, hasattr(kind, "get_reward"), [schema_of(tool) for tool in tools.values()], needs)

    def _wrong_args(self) -> str | None:
        """Why the constructor does not take the recipe's ``args``, if so."""
        assert self.make is not None
        try:
            signature = inspect.signature(self.make)
        except (TypeError, ValueError):  # some classes of C have none
            return None
        try:
            signature.bind(**self.spec.args)
        except TypeError as why:
            takes = ", ".join(map(str, signature.parameters.values())) or "none"
            said = f"environment.args: {self.spec.source}: {why} (it takes: {takes})"
            tool = ". It is a function: if it is a tool, name it in environment.tools"
            return said + (tool if inspect.isfunction(self.make) else "")
        return None

    def _problems_of_game(self, environment: Any, where: str) -> Iterator[str]:
        if self.functions:
            yield f"environment.tools: {self.spec.source} has a step, which gets every turn; it has no tools"
        more = list(inspect.signature(environment.step).parameters.values())[1:]
        methods = methods_of(environment)
        others = [name for name, method in methods.items() if name != "step" and _could_be_tool(method)]
        cure = "give a tool another name than step, and what is no tool a name that begins with _"
        if more and all(parameter.default is not parameter.empty for parameter in more):
            names = ", ".join(parameter.name for parameter in more)
            yield f"{where}: {_line_of(environment.step)}step gets a turn's text alone, never {names}: {cure}"
        elif others:
            yield f"{where}: it has a step, which gets every turn, so {', '.join(others)} would be no tools: {cure}"

    def _problems(self, environment: Any) -> Iterator[str]:
        kind = type(environment)
        where = f"{self.key}: {self.spec.source}"
        if self.make is not None:
            if not callable(getattr(kind, "reset", None)):
                yield (
                    f"{where}: {_line_of(kind)}{kind.__name__} has no reset; an environment has reset(**row) and tools "
                    "(public methods), or reset(**row) and step(text)"
                )
            for name, arguments in (("get_reward", ()), ("step", ("text",))):
                if hasattr(kind, name):
                    yield from _call_problems(getattr(environment, name), arguments, where)
            if hasattr(kind, "step"):
                yield from self._problems_of_game(environment, where)
                return
        named: dict[str, str] = {}
        for number, function in enumerate(self.functions):
            at = f"environment.tools[{number}]: {self.spec.tools[number]}"
            if not callable(function) or inspect.isclass(function):
                yield f"{at} is {user_code.brief(function)}; expected a function"
                continue
            yield from _tool_problems(function, at)
            named[function.__name__] = at
        for name, method in methods_of(environment).items():
            if name in named:
                yield f"{named[name]}: the environment has a method of that name too; rename one"
            yield from _tool_problems(method, where)
        if self.make is not None and not named and not methods_of(environment):
            yield (
                f"{where}: {_line_of(kind)}{kind.__name__} has neither a step(text) nor a public method that the model "
                "could call"
            )


def _could_be_tool(method: Callable[..., Any]) -> bool:
    try:
        schema_of(method)
    except NoSchema:
        return False
    return True


def methods_of(environment: Any) -> dict[str, Callable[..., Any]]:
    """The public methods of TRL's class that are tools, by name. They are listed on the class, as TRL does it: on the
    instance, properties would be evaluated."""
    return {
        name: getattr(environment, name)
        for name, _ in inspect.getmembers(type(environment), predicate=inspect.isfunction)
        if not name.startswith("_") and name not in OWN
    }


def tools_of(environment: Any, functions: list[Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """All tools of an episode, by name: the recipe's functions and the environment's methods."""
    return {function.__name__: function for function in functions} | methods_of(environment)


def _tool_problems(function: Callable[..., Any], where: str) -> Iterator[str]:
    try:
        schema_of(function)
    except NoSchema as why:
        yield f"{where}: {_line_of(function)}{function.__qualname__}: {why}"


def _call_problems(method: Any, arguments: tuple[str, ...], where: str) -> Iterator[str]:
    """Whether a method of the protocol can be called as it will be."""
    try:
        user_code.must_take(method, arguments, f"{where}: {_line_of(method)}{getattr(method, '__qualname__', method)}")
    except UserError as why:
        yield str(why)


def _line_of(thing: Any) -> str:
    """``file.py:12: `` of a class or function, empty where it has none."""
    code = getattr(inspect.unwrap(thing), "__code__", None)
    if code is not None:
        return f"{code.co_filename}:{code.co_firstlineno}: "
    try:
        return f"{inspect.getsourcefile(thing)}:{inspect.getsourcelines(thing)[1]}: "
    except (OSError, TypeError):
        return ""


def accepted(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that a function takes: all with ``**kwargs``, else those that it names."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    named = {parameter.name for parameter in parameters}
    return {name: value for name, value in offered.items() if name in named}


def needed(function: Callable[..., Any]) -> list[str]:
    """The arguments without which a function cannot be called."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return sorted(p.name for p in parameters if p.kind in by_name and p.default is p.empty)
