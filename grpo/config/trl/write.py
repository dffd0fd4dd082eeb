"""A conversion in words: a recipe with a header that says what became of every key."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.config.trl.conversion import Conversion
from grpo.config.yaml_text import YamlError, dump, parse
from grpo.errors import UserError

TRL = "1.16"  # the version whose keys, defaults and meanings these are


def read_trl(file: Path) -> dict[str, Any]:
    """The keys of a YAML file of ``trl grpo --config``, or of a JSON file of a GRPOConfig or SFTConfig.

    Raises UserError where it can't be read, or holds no mapping of keys to values.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text; save the file as UTF-8") from None
    if file.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON: {error}") from None
    else:
        try:
            document = parse(text)
        except YamlError as error:
            raise UserError(f"{file}{f':{error.line}' if error.line else ''}: {error}") from None
        if document.problems:
            raise UserError("\n".join(f"{file}:{line}: {what}" for line, what in document.problems))
        value = document.value
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: a configuration of TRL's is a mapping, such as num_generations: 8")
    if {"model", "training"} <= value.keys():
        raise UserError(f"{file}: is a recipe already (it has sections): grpo validate {file}")
    return value


def write_recipe(found: Conversion, source: str) -> str:
    """The recipe as YAML with its header of comments. What is read back equals ``found.recipe``."""
    trainer = {"grpo": "GRPO", "sft": "SFT"}[found.stage]
    parts = [
        f"Converted from {source}, as TRL {TRL}'s {trainer} trainer reads it. grpo validate checks it.",
        _listed("To fill in", [f"{place}: {what}" for place, what in found.to_fill]),
        _run_on("Carried over, in the same meaning", [f"{key} -> {place}" for key, place in found.carried]),
        _listed("Changed", [f"{keys} -> {what}" for keys, what in found.changed]),
        _listed("Not given; TRL's default, written out", [f"{place}: {what}" for place, what in found.defaults]),
        _listed("No place here", [f"{key}: {why}" for key, why in found.left]),
        _run_on("At a value that asks for nothing here", found.at_default),
    ]
    header = "\n#\n".join(_commented(part) for part in parts if part)
    return f"{header}\n{dump(found.recipe)}"


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(f"  {line}" for line in dict.fromkeys(lines))]) if lines else ""


def _run_on(title: str, items: Sequence[str]) -> str:
    return f"{title}: {', '.join(dict.fromkeys(items))}" if items else ""


def _commented(text: str) -> str:
    """Lines of comments of at most 118 characters. A value's own line ends would end the comment."""
    lines = []
    for line in text.split("\n"):
        clean = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", line)
        hanging = "    " if clean.startswith("  ") else "  "
        lines += textwrap.wrap(clean, 116, subsequent_indent=hanging, break_on_hyphens=False) or [""]
    return "\n".join(f"# {line}".rstrip() for line in lines)
