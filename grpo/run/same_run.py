"""Is a resumed run the one that wrote the checkpoint? If not, it is refused, with the keys that differ.

Exact resume replays the same draws in the same shapes on the same number of threads and processes. A run that goes on
under another seed or model would be neither the old run nor a new one. On another number of processes it is the same
run, to rounding: that is what a user has who gets fewer GPUs, or more.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from itertools import zip_longest
from typing import Any

from pydantic import ValidationError

from grpo.config import Recipe
from grpo.config.load import LEFT_OUT
from grpo.config.resume import on_resume
from grpo.errors import UserError
from grpo.run.secrets import recipe_without_secrets

log = logging.getLogger("grpo")

_ABSENT = object()

# Of the manifest, beside the recipe: what changes results by rounding alone.
ROUNDS_DIFFERENTLY = ("versions", "world_size")
ALLOW_INPUTS = "--allow-changed-inputs"


def run_identity(
    recipe: Recipe, *, world_size: int, threads: int | None, inputs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What makes a run this run: for the manifest when saving, for ``check_same_run`` when resuming.

    ``threads`` are those that compute, None where a GPU does. ``inputs`` are hashes by name (``inputs.py``).
    """
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")}
    return {
        "recipe": recipe_without_secrets(recipe),
        "world_size": world_size,
        "versions": {"python": platform.python_version(), **versions},
        **({} if threads is None else {"threads": threads}),
        **({} if inputs is None else {"inputs": dict(inputs)}),
    }


def check_same_run(manifest: Mapping[str, Any], now: Mapping[str, Any], *, allow_changed_inputs: bool = False) -> None:
    """Refuse to resume as another run: raises UserError that lists each differing key of ``now``, old -> new, and each
    input that has changed.

    ``config/resume.py`` says which keys may differ, and with which of them a line warns that the run will not be equal
    to the bit. So it is with library versions, the number of processes (and then of threads), and with changed inputs
    where they are allowed. What ``manifest`` or ``now`` does not name, as an earlier version's, is not compared.
    """
    refused, warned = changes(manifest, now)
    inputs = changed_inputs(manifest.get("inputs"), now.get("inputs"))
    problems = []
    if refused:
        problems.append(
            "the checkpoint belongs to another run; it differs in\n  "
            + "\n  ".join(refused)
            + "\nResume with the values that it was made with, or start a new run in another training.output_dir."
        )
    if inputs and not allow_changed_inputs:
        problems.append(
            "what the run is made from is not what it was when the checkpoint was written:\n  "
            + "\n  ".join(inputs)
            + f"\nBring it back, or go on with what is there now: {ALLOW_INPUTS}."
        )
    if problems:
        raise UserError("\n".join(problems))
    if warned or inputs:
        log.warning("resumed with changes, not equal to the bit: %s", "; ".join([*warned, *inputs]))


def check_same_recipe(before: dict[str, Any], recipe: Recipe) -> None:
    """Raises UserError as ``check_same_run`` does, for the recipe alone; what may change passes in silence."""
    refused, _ = changes({"recipe": before}, {"recipe": recipe_without_secrets(recipe)})
    if refused:
        raise UserError(
            "the folder holds another run; it differs in\n  "
            + "\n  ".join(refused)
            + "\nResume with the values that it was made with, or start a new run in another training.output_dir."
        )


def changes(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two identities and may not, and what may but rounds differently, in words."""
    shared = {key: manifest[key] for key in now.keys() & manifest.keys() if key != "inputs"}
    if "recipe" in shared:
        shared["recipe"] = _of_this_version(shared["recipe"])
    here = json.loads(json.dumps({key: now[key] for key in shared}))
    # Secrets may change, and are not shown.
    found = [change for change in differences(shared, here) if not any(LEFT_OUT in value for value in change[1:])]
    # A launch of several processes sets the number of threads too.
    rounds = ROUNDS_DIFFERENTLY + (("threads",) if "world_size" in [key for key, *_ in found] else ())
    refused: list[str] = []
    warned: list[str] = []
    for key, old, new in found:
        name = key.removeprefix("recipe.")
        meaning = on_resume(name) if name != key else "warns" if key.startswith(rounds) else "refused"
        if meaning != "free":
            (refused if meaning == "refused" else warned).append(f"{name}: {old} -> {new}")
    return refused, warned


def changed_inputs(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> list[str]:
    """The inputs whose hashes differ, each in words; none where one of the two is not known."""
    if before is None or now is None:
        return []
    words = {(True, True): "has changed", (True, False): "is gone", (False, True): "is new"}
    names = sorted(before.keys() | now.keys())
    return [f"{name} {words[name in before, name in now]}" for name in names if before.get(name) != now.get(name)]


def _of_this_version(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version wrote, with its defaults for the keys that have come since."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:  # it has a key that is gone: compared as it is
        return recipe


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, old value, new value) for each leaf where two JSON values differ, list items by their index."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from differences(old.get(name, _ABSENT), new.get(name, _ABSENT), f"{key}.{name}" if key else name)
    elif isinstance(old, list) and isinstance(new, list):
        for index, pair in enumerate(zip_longest(old, new, fillvalue=_ABSENT)):
            yield from differences(*pair, f"{key}.{index}")
    elif old != new:
        yield key, _shown(old), _shown(new)


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
