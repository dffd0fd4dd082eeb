"""What pydantic finds wrong with a recipe, in words, each with the line or the override that it came from."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from grpo.config.base import Problem, Refused
from grpo.config.hints import foreign, sections, unknown_key
from grpo.config.recipe import Recipe
from grpo.config.yaml_text import KeyPath, YamlError, dotted, parse


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was given: a line of the file, or an override (they sort after all lines)."""

    order: int
    text: str
    path: KeyPath = ()  # the key that an override names


Finding = tuple[Origin, str]  # a message without its place, and the place
OVERRIDES_FROM = 1 << 40  # more lines than a recipe has

NOUNS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a section (key: value)",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def problems_of(error: ValidationError, value: dict[str, Any], origins: dict[KeyPath, Origin]) -> list[Finding]:
    """Every finding of pydantic's with its origin, cross-field checks that pydantic skipped included."""
    found: list[Finding] = []
    meant: set[str] = set()  # keys that an unknown key probably stands for: not missing, only misspelt
    nouns: dict[KeyPath, list[str]] = {}  # a union reports each member: one line for all of them
    wrong: list[KeyPath] = []
    missing: list[tuple[KeyPath, str]] = []
    for detail in error.errors(include_url=False):
        path = value_path(detail, value)
        if detail["type"] == "extra_forbidden":
            for inner, message, key in _unknown(path, detail["input"]):
                found.append((origin_of(inner, origins), with_key(inner, message, origins)))
                if key:
                    meant.add(dotted((*_without_indices(path[:-1]), key)))
        elif detail["type"] == "missing":
            missing.append((path, "missing" + _meaning(path)))
        elif detail["type"] == "value_error":
            found += [placed(problem, detail, value, origins) for problem in problems_in(detail)]
            wrong += _blamed(detail, value, wrong)
            continue
        elif detail["type"] in NOUNS:
            nouns.setdefault(path, []).append(NOUNS[detail["type"]])
        else:
            found.append((origin_of(path, origins), with_key(path, bound_or_choice(path, detail), origins)))
        wrong.append(path)
    for path, expected in nouns.items():
        got = _at(value, path)
        message = f"expected {' or '.join(dict.fromkeys(expected))}, got {show(got)}{_cure(got, expected)}"
        found.append((origin_of(path, origins), with_key(path, message, origins)))
    for path, message in missing:
        if dotted(path) not in meant:
            found.append((origin_of(path, origins), with_key(path, message, origins)))
    return found + _skipped_checks(value, wrong, meant, origins)


def _skipped_checks(
    value: dict[str, Any], wrong: list[KeyPath], meant: set[str], origins: dict[KeyPath, Origin]
) -> list[Finding]:
    """Checks between keys, which pydantic leaves out while one of their fields is wrong: tried again without those.

    What they say of a field that was left out is not reported, since its default is not what the person wrote.
    """
    found: list[Finding] = []
    while True:  # each round leaves out more, until nothing is wrong or nothing is left to leave out
        try:
            Recipe.model_validate(_without(value, wrong))
            return found
        except ValidationError as error:
            details = [d for d in error.errors(include_url=False) if d["type"] == "value_error"]
        absent = {dotted(_without_indices(path)) for path in wrong} | meant
        for detail in details:
            section = _without_indices(value_path(detail, value))
            for problem in problems_in(detail):
                keys = [dotted((*section, *_without_indices(_path(key)))) for key in problem.keys]
                if not any(_overlap(key, gone) for key in keys for gone in absent):
                    found.append(placed(problem, detail, value, origins))
        blamed = [path for detail in details for path in _blamed(detail, value, wrong)]
        if not blamed:
            return found
        wrong = wrong + blamed


def _blamed(detail: ErrorDetails, value: dict[str, Any], known: list[KeyPath]) -> list[KeyPath]:
    """The keys that a validator named, or else its section, but for those already ``known`` to be wrong."""
    path = value_path(detail, value)
    named = [inner for problem in problems_in(detail) for inner in _given(path, problem, value) if inner not in known]
    return named or [path] * (path != () and path not in known)


_LEAST = {"data": {"name": "?"}, "model": {"name": "?"}, "training": {"output_dir": "?"}, "rewards": {"name": "?"}}
_LEAST |= {"data.mix": {"name": "?"}, "data.mix.rewards": {"name": "?"}}
_LISTS = ("rewards", "data.mix", "data.mix.rewards")


def _without(value: dict[str, Any], wrong: list[KeyPath]) -> dict[str, Any]:
    """A copy of ``value`` without wrong keys; a wrong or missing section becomes the least that is valid."""
    pruned = copy.deepcopy(value)
    for path in sorted(wrong, key=lambda p: (len(p), [str(part).zfill(9) for part in p]), reverse=True):
        container = _at(pruned, path[:-1])
        if not _has(container, path[-1]):
            continue
        section = dotted(_without_indices(path))
        if section in _LISTS and isinstance(path[-1], str):
            container[path[-1]] = []
        elif section in sections():
            container[path[-1]] = dict(_LEAST.get(section, {}))
        else:
            del container[path[-1]]
    for section in ("model", "training"):
        pruned[section] = {**_LEAST[section], **pruned.get(section, {})}
    return {"data": _LEAST["data"], **pruned}


def value_path(detail: ErrorDetails, value: Any) -> KeyPath:
    """Pydantic's location without the names of union members, which are not in the file."""
    path: list[str | int] = []
    for part in detail["loc"]:
        if _has(value, part):
            path.append(part)
            value = value[part]
        elif detail["type"] == "missing":
            path.append(part)
    return tuple(path)


def _has(container: Any, part: str | int) -> bool:
    if isinstance(container, list):
        return isinstance(part, int) and part < len(container)
    return isinstance(container, dict) and part in container


def _at(value: Any, path: KeyPath) -> Any:
    for part in path:
        value = value[part]
    return value


def origin_of(path: KeyPath, origins: dict[KeyPath, Origin]) -> Origin:
    """Where ``path`` was given, or else the nearest section around it."""
    return next(origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origins)


def with_key(path: KeyPath, message: str, origins: dict[KeyPath, Origin]) -> str:
    # "override rollout.top_p=2: must be ..." names the key already.
    return message if not path or origin_of(path, origins).path == path else f"{dotted(path)}: {message}"


def _without_indices(path: KeyPath) -> tuple[str, ...]:
    return tuple(part for part in path if isinstance(part, str))


def _unknown(path: KeyPath, given: Any) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Path, message and probable key of an unknown key; of a foreign section, every key that has a place here."""
    inner = [(deep, f"unknown key: {hint}", None) for deep in _leaves(path, given) if (hint := foreign(dotted(deep)))]
    if isinstance(given, dict) and inner:
        yield from inner
    else:
        yield (path, *unknown_key(dotted(_without_indices(path[:-1])), str(path[-1])))


def _leaves(path: KeyPath, value: Any) -> Iterator[KeyPath]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves((*path, key), item)
    else:
        yield path


def _meaning(path: KeyPath) -> str:
    *section, key = _without_indices(path)
    field = sections()[".".join(section)].model_fields.get(key)
    return f". {' '.join(field.description.split())}" if field and field.description else ""


def problems_in(detail: ErrorDetails) -> Sequence[Problem]:
    """What a validator found; a field's own validator raises a plain ValueError, which is of that field."""
    error = detail["ctx"]["error"]
    return error.problems if isinstance(error, Refused) else [Problem((), str(error))]


def placed(problem: Problem, detail: ErrorDetails, value: dict[str, Any], origins: dict[KeyPath, Origin]) -> Finding:
    """A validator's problem with its place: an override of one of its keys, or else the first key that was given."""
    path = value_path(detail, value)
    places = [origin_of(inner, origins) for inner in _given(path, problem, value)]
    overridden = [place for place in places if place.order >= OVERRIDES_FROM]
    place = max(overridden) if overridden else next(iter(places), origin_of(path, origins))
    return place, f"{dotted(path)}: {problem.text}" if path else problem.text


def _given(path: KeyPath, problem: Problem, value: dict[str, Any]) -> list[KeyPath]:
    """The problem's keys that were given in the section ``path``."""
    keys = [(*path, *_path(key)) for key in problem.keys]
    return [inner for inner in keys if all(_has(_at(value, inner[:n]), inner[n]) for n in range(len(inner)))]


def _path(key: str) -> KeyPath:
    """A problem's key, ``data.mix.0.rewards``, as a path."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _overlap(key: str, other: str) -> bool:
    """Whether one dotted key is the other or lies in it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def bound_or_choice(path: KeyPath, detail: ErrorDetails) -> str:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"must be {word} {context[name]:g}, got {show(given)}{_meaning(path)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(given), choices, n=1) if isinstance(given, str) else []
        must = f"must be {', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else f"must be {choices[0]}"
        return f"{must}, got {show(given)}" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "finite_number":
        return f"must be a finite number, got {show(given)}"
    return f"{detail['msg']}, got {show(given)}"


def show(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cure(got: Any, expected: list[str]) -> str:
    """How to write what was probably meant."""
    wants_number = "an integer" in expected or "a number" in expected
    if "an integer" in expected and isinstance(got, float) and got.is_integer():
        return f" (write {int(got)})"
    if "text" in expected and isinstance(got, (int, float)):
        return " (put it in quotes)"
    if isinstance(got, str) and wants_number:
        try:
            plain = parse(got).value
        except YamlError:
            return ""
        return " (without the quotes)" if isinstance(plain, (int, float)) and not isinstance(plain, bool) else ""
    if isinstance(got, str) and "true or false" in expected:
        meant = {"yes": "true", "on": "true", "true": "true", "no": "false", "off": "false", "false": "false"}
        return f" (write {meant[got.lower()]})" if got.lower() in meant else ""
    return ""
