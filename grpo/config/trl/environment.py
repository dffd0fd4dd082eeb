"""Tools and environments: what of a script or configuration of TRL's says who answers the model between its turns.

TRL takes both in code (``GRPOTrainer(tools=[…], environment_factory=…)``); here they may stand in the file by their
place, ``file.py:name``, beside ``max_tool_calling_iterations``.
"""

from __future__ import annotations

import ast
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.config.trl.conversion import Conversion

TURNS = "environment.max_turns"
YOURS = "YOUR_ENVIRONMENT.py:YOUR_CLASS"


def convert_environment(found: Conversion) -> None:
    """The section ``environment``, where the file speaks of tools, an environment or their turns."""
    _factory(found)
    _tools(found)
    given = found.has("max_tool_calling_iterations")
    calls = found.whole("max_tool_calling_iterations") if given else found.get("max_tool_calling_iterations")
    if not given and "environment" not in found.recipe:
        return
    if "environment" not in found.recipe:
        found.fill(
            "environment.path", YOURS, "what TRL's script gives as environment_factory; or tools: [file.py:name]"
        )
    if calls is None:
        found.default(TURNS, 8, "TRL sets no limit where max_tool_calling_iterations is not given")
        return
    found.put(TURNS, int(calls) + 1, "max_tool_calling_iterations")
    found.change("max_tool_calling_iterations", f"{TURNS}: {int(calls) + 1}, the turn after the last call included")


def environment_pays(found: Conversion) -> bool:
    """Whether the environment's class has a ``get_reward``, as far as its file can be read: nothing is run."""
    place = str(found.recipe.get("environment", {}).get("path", ""))
    file, _, name = place.rpartition(":")
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.walk(ast.parse(Path(file).expanduser().read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name == name:
                return any(getattr(part, "name", "") == "get_reward" for part in node.body)
    return False


def _factory(found: Conversion) -> None:
    given = found.get("environment_factory")
    if given is None:
        return
    if isinstance(given, dict):
        why = "a recipe has one environment; one class can choose by the row's column in reset(**row)"
        found.leave("environment_factory", why)
    elif _is_place(given):
        found.put("environment.path", given, "environment_factory")
        found.carried.append(("environment_factory", "environment.path"))
    else:
        found.fill("environment.path", YOURS, f"the place of {given}: file.py:{given}")


def _tools(found: Conversion) -> None:
    given = found.get("tools")
    if given is None:
        return
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    places = [name if _is_place(name) else f"YOUR_TOOLS.py:{name}" for name in names]
    found.put("environment.tools", places, "tools")
    found.carried.append(("tools", "environment.tools"))
    if unknown := [name for name in names if not _is_place(name)]:
        found.to_fill.append(("environment.tools", f"the place of {', '.join(unknown)}: file.py:function"))


def _is_place(name: Any) -> bool:
    return isinstance(name, str) and all(part.strip() for part in name.rpartition(":"))
