"""YAML as people mean it, with a line number for every key.

Unlike with PyYAML's SafeLoader, ``1e-6`` is a number (YAML 1.1 wants ``1.0e-6``), only ``true`` and ``false`` are
booleans, so that ``wandb: off`` stays text, and so do dates, octal and base-60 numbers. A duplicate key, which PyYAML
silently lets win, is a problem that names both lines. Values become plain dicts, lists and scalars, nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

MOST_VALUES = 100_000  # in one document, what aliases repeat included: a few lines of them can stand for billions

_TAG = "tag:yaml.org,2002:"
_IMPLICIT = {
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "int": (r"(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    "float": (
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    "merge": (r"(?:<<)$", ["<"]),
}


_SCALARS = {_TAG + name for name in ("str", "null", "bool", "int", "float")}


class RecipeLoader(yaml.SafeLoader):
    """Safe loader with the scalar rules of this module."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise _too_many(node)


class RecipeDumper(yaml.SafeDumper):
    """Quotes what ``RecipeLoader`` or any YAML 1.1 reader would otherwise read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes Unicode's own line ends into plain and single-quoted text, and reads them back as other characters.
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


RecipeDumper.add_representer(str, _represent_text)
RecipeLoader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _name, (_pattern, _first) in _IMPLICIT.items():
    RecipeLoader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
RecipeDumper.add_implicit_resolver(_TAG + "float", re.compile(_IMPLICIT["float"][0]), _IMPLICIT["float"][1])


class YamlError(Exception):
    """Not YAML at all. ``line`` counts from 1; None where there is no place to point at."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Document:
    """A parsed text: its value, the line of every key and list item, and what is wrong with it, by line."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)
    values: int = 0


def dotted(path: KeyPath) -> str:
    """``("rewards", 0, "weight")`` as a person writes it: ``rewards.0.weight``."""
    return ".".join(str(part) for part in path)


def dump(value: Any) -> str:
    """Block-style YAML that ``parse`` reads back as the same value."""
    return yaml.dump(value, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def parse(text: str) -> Document:
    """Read one YAML document. Raises YamlError if it is none; other problems are collected in the result."""
    document = Document()
    try:
        loader = RecipeLoader(text)
        root = loader.get_single_node()
        if root is not None:
            _find_duplicates(root, (), document, set())
            document.value = _build(loader, root, (), document, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(_explain(error), mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(f"not valid YAML: the character {chr(error.character)!r} is not allowed", line) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    return document


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "cannot be read"
    if r"'\t'" in problem:
        problem += "; indent with spaces, not tabs"
    elif "block end" in problem or "mapping values" in problem:
        problem += "; check the indentation, and quote text that holds ': '"
    elif "'@'" in problem or "'`'" in problem or "'%'" in problem:
        problem += "; quote the value"
    return f"not valid YAML: {problem}"


def _too_many(node: yaml.Node) -> YamlError:
    return YamlError(f"more than {MOST_VALUES:,} values; aliases (*name) repeat all that they stand for", _line(node))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _find_duplicates(node: yaml.Node, path: KeyPath, document: Document, seen: set[int]) -> None:
    # A pass of its own, before merge keys (<<) are expanded: a key that overrides a merged one is no duplicate.
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _find_duplicates(item, (*path, i), document, seen)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, item in node.value:
            if isinstance(key, yaml.ScalarNode):
                here = (*path, key.value)
                if key.value in first:
                    message = f"{dotted(here)}: duplicate key, first given on line {first[key.value]}"
                    document.problems.append((_line(key), message))
                first.setdefault(key.value, _line(key))
                _find_duplicates(item, here, document, seen)


def _build(loader: RecipeLoader, node: yaml.Node, path: KeyPath, document: Document, above: tuple[int, ...]) -> Any:
    """The node's value; lines and problems go into ``document``. ``above`` are the nodes that this one lies in."""

    def problem(at: yaml.Node, message: str) -> None:
        document.problems.append((_line(at), f"{dotted(path)}: {message}" if path else message))

    document.lines.setdefault(path, _line(node))
    document.values += 1
    if document.values > MOST_VALUES:
        raise _too_many(node)
    if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
        try:
            return loader.construct_object(node)
        except (ValueError, KeyError):  # an explicit tag on what it does not fit, an integer of thousands of digits
            return problem(node, f"cannot be read as {node.tag.replace(_TAG, '!!')}: {node.value[:40]!r}")
    if id(node) in above:
        return problem(node, "an alias that contains itself")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_build(loader, item, (*path, i), document, above) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode) or node.tag != _TAG + "map":
        return problem(node, f"the tag {node.tag.replace(_TAG, '!!')} is not used in recipes")

    loader.flatten_mapping(node)
    mapping: dict[str, Any] = {}
    for key, item in node.value:
        if key.tag != _TAG + "str":
            what = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            problem(key, f"keys are text, got {what}; quote it")
            continue
        here = (*path, key.value)
        document.lines[here] = _line(key)
        mapping[key.value] = _build(loader, item, here, document, above)
    return mapping
