"""A recipe file and its overrides into a ``Recipe``, or one message that names everything wrong with them.

``yaml_text`` reads the text, ``problems`` puts what is wrong into words, ``hints`` explains unknown keys. None of them
imports anything heavy: a wrong recipe is told before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo.config.find import find_recipe
from grpo.config.hints import section_in, sections
from grpo.config.problems import OVERRIDES_FROM, Finding, Origin, problems_of, show
from grpo.config.recipe import Recipe
from grpo.config.yaml_text import KeyPath, YamlError, dotted, dump, parse
from grpo.errors import UserError

LEFT_OUT = "<secret-left-out>"  # stands for a secret in what a run has written


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read ``path``, a file or the name of a shipped recipe, apply ``a.b=c`` overrides in order, validate.

    Raises UserError with every problem at once, one a line: ``recipe.yaml:12: rollout.top_p: ...``.
    """
    mapping = read_mapping(find_recipe(path), "a recipe", ("model:", "data:", "training:"))
    return _checked(*mapping, list(overrides))


def recipe_of(value: dict[str, Any], source: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of a mapping that no file holds; ``source`` says where it is from. Raises UserError as above."""
    return _checked(value, {(): Origin(0, source)}, [], list(overrides))


def _checked(
    value: dict[str, Any], origins: dict[KeyPath, Origin], problems: list[Finding], overrides: list[str]
) -> Recipe:
    if written := as_overrides(overrides):
        raise UserError("\n".join(written))
    problems += override_all(value, origins, overrides)
    _drop_empty_sections(value)
    problems += [(_origin(origins, path), text) for path, text in _left_out(value)]
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        problems += problems_of(error, value, origins)
    if problems:
        lines = dict.fromkeys(f"{origin.text}: {message}" for origin, message in sorted(problems))
        raise UserError("\n".join(lines))
    return recipe


def as_overrides(words: Sequence[str]) -> list[str]:
    """What to write instead of words of a command line that set keys in another form: ``rollout.temperature 0.8``,
    ``--rollout.temperature=0.8``. A line for each; none where all are ``KEY=VALUE``."""
    lines = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.lstrip("-").partition("=")
        if not is_key(key) or (equals and text and not word.startswith("-")):
            continue
        taken = [word]
        while rest and not text and not is_key(rest[0].lstrip("-").partition("=")[0]):
            taken.append(rest.pop(0))
            text = taken[-1].removeprefix("=")
        if len(taken) > 1 or word.startswith("-") or not equals:
            lines.append(f"{' '.join(taken)}: write {key}={text or 'VALUE'}")
    return lines


def is_key(word: str) -> bool:
    """Whether a word is a key of the recipe, such as ``rollout.temperature`` or ``rewards.0.weight``."""
    section, _, key = ".".join(part for part in word.split(".") if not part.isdecimal()).rpartition(".")
    return bool(section) and section in sections() and key in sections()[section].model_fields


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe, every default written out, as YAML that loads back equal."""
    return dump(recipe.model_dump())


def dump_given(recipe: Recipe) -> str:
    """What of the resolved recipe is not a default, as YAML that loads back equal in this version."""
    return dump(recipe.model_dump(exclude_defaults=True))


def read_mapping(
    file: Path, what: str, keys: tuple[str, str, str]
) -> tuple[dict[str, Any], dict[KeyPath, Origin], list[Finding]]:
    """The value of a YAML file, where each key stands in it, and what is wrong with it short of being none.

    Raises UserError where it is no YAML, or no mapping: in words of ``what`` it should be, with some of its ``keys``.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        document = parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    except YamlError as error:
        raise UserError(f"{file}{f':{error.line}' if error.line else ''}: {error}") from None
    if document.value is None and not document.problems:
        raise UserError(f"{file}: the file is empty; {what} has sections such as {', '.join(keys[:2])} and {keys[2]}")
    if not isinstance(document.value, dict):
        raise UserError(
            f"{file}: {what} is a mapping of sections ({', '.join(keys[:2])}, ...), got {show(document.value)}"
        )
    origins = {path: Origin(line, f"{file}:{line}") for path, line in document.lines.items()}
    origins[()] = Origin(0, str(file))
    return document.value, origins, [(Origin(line, f"{file}:{line}"), text) for line, text in document.problems]


def override_all(value: dict[str, Any], origins: dict[KeyPath, Origin], overrides: Sequence[str]) -> list[Finding]:
    """Apply ``a.b=c`` to ``value`` in order. Returns what is wrong with them."""
    problems = []
    for i, override in enumerate(overrides):
        origin = Origin(OVERRIDES_FROM + i, f"override {override}")
        try:
            _override(value, origins, origin, override)
        except ValueError as error:
            problems.append((origin, str(error)))
    return problems


def _override(value: dict[str, Any], origins: dict[KeyPath, Origin], origin: Origin, override: str) -> None:
    """Set one ``a.b=c`` in ``value``, making sections and list items that are missing. Raises ValueError."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError("an override is KEY=VALUE, such as rollout.temperature=0.8")
    try:
        document = parse(text)
    except YamlError as error:
        raise ValueError(str(error)) from None
    if document.problems:
        raise ValueError("; ".join(message for _, message in document.problems))

    *outer, last = parts
    here: Any = value
    path: KeyPath = ()
    for part, following in zip(outer, parts[1:], strict=True):
        step = _step(here, path, part)
        path = (*path, step)
        if _get(here, step) is None:
            _put(here, step, [] if following == "0" else {})
            origins[path] = origin
        here = _get(here, step)
    step = _step(here, path, last)
    path = (*path, step)
    is_comment = document.value is None and text.strip().startswith("#")
    _put(here, step, text if is_comment else document.value)
    for inner in [p for p in origins if p[: len(path)] == path]:
        del origins[inner]
    origins[path] = Origin(origin.order, origin.text, path)


def _get(container: Any, step: str | int) -> Any:
    if isinstance(container, dict):
        return container.get(step)
    return container[step] if step != len(container) else None


def _put(container: Any, step: str | int, item: Any) -> None:
    if isinstance(container, list) and step == len(container):
        container.append(item)
    else:
        container[step] = item


def _step(here: Any, path: KeyPath, part: str) -> str | int:
    """``part`` of an override's key as a key or index of ``here``; one past a list's end appends to it."""
    if isinstance(here, dict):
        return part
    if not isinstance(here, list):
        raise ValueError(f"{dotted(path)} is {show(here)}, it has nothing inside to set")
    if not (part.isascii() and part.isdecimal()) or int(part) > len(here):
        count = "is an empty list" if not here else f"has {len(here)} item{'s' * (len(here) > 1)}, 0 to {len(here) - 1}"
        raise ValueError(f"{dotted(path)} {count}; {part} is not one of them ({len(here)} adds one)")
    return int(part)


def _left_out(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Secrets that a run did not write down, and which are needed again."""
    if isinstance(value, (dict, list)):
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _left_out(item, (*path, step))
    elif isinstance(value, str) and LEFT_OUT in value:
        key = ".".join(map(str, path))
        yield path, f"{dotted(path)}: a secret, which the run left out of its folder; give it again: {key}=..."


def _origin(origins: dict[KeyPath, Origin], path: KeyPath) -> Origin:
    """Where a value stands in the file, or what is nearest around it."""
    return next(origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origins)


def _drop_empty_sections(value: dict[str, Any]) -> None:
    # `rollout:` with every key commented out reads as null; what is meant is a section without keys.
    for key, field in Recipe.model_fields.items():
        if key in value and value[key] is None and section_in(field):
            del value[key]
