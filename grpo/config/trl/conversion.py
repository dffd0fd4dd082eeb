"""What a conversion holds while it goes on, and ``convert``, which does it."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ValidationError

from grpo.config.hints import foreign, sections
from grpo.config.problems import Origin, problems_of
from grpo.config.recipe import Recipe
from grpo.config.trl import environment, length, model, sampling
from grpo.config.trl.keys import (
    CARRIED,
    CARRIED_GRPO,
    CARRIED_SFT,
    CARRIED_VLLM,
    COMPUTED,
    COMPUTED_GRPO,
    COMPUTED_SFT,
    DEFAULTS_WITHOUT_PLACE,
    NO_PLACE,
    ONLY_GRPO,
    ONLY_SFT,
    Carried,
    known_keys,
)
from grpo.config.yaml_text import KeyPath, YamlError, parse
from grpo.errors import UserError

Stage = Literal["grpo", "sft"]
TEXT = {"model_name_or_path", "output_dir", "run_name"}  # values that stay text, whatever they look like


@dataclass
class Conversion:
    """A configuration of TRL's (``given``) on its way to a recipe, and what there is to tell of it."""

    given: dict[str, Any]
    stage: Stage
    num_processes: int | None = None
    rows: int | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: list[tuple[str, str]] = field(default_factory=list)  # TRL's key, its place
    changed: list[tuple[str, str]] = field(default_factory=list)  # TRL's keys, what became of them
    defaults: list[tuple[str, str]] = field(default_factory=list)  # our place, what TRL does where nothing is said
    left: list[tuple[str, str]] = field(default_factory=list)  # TRL's key, why it has no place
    at_default: list[str] = field(default_factory=list)  # at a value that asks for nothing here
    to_fill: list[tuple[str, str]] = field(default_factory=list)  # our place, what TRL takes in code
    sources: dict[KeyPath, str] = field(default_factory=dict)  # which of TRL's keys a value came from
    seen: set[str] = field(default_factory=set)

    def has(self, key: str) -> bool:
        """Whether the file gives ``key`` a value; null is none."""
        return self.given.get(key) is not None

    def get(self, key: str) -> Any:
        """The value of ``key``, or TRL's default. Text that reads as a number or a boolean is one, as for TRL."""
        self.seen.add(key)
        if self.has(key):
            return self.given[key] if key in TEXT else _as_value(self.given[key])
        return self.trl_default(key)

    def trl_default(self, key: str) -> Any:
        """What TRL takes where ``key`` is not given; None for a key without a place."""
        carried = {**CARRIED, **(CARRIED_GRPO if self.stage == "grpo" else CARRIED_SFT)}
        if key in carried:
            return carried[key].default
        if key in CARRIED_VLLM:
            return CARRIED_VLLM[key][1].default
        return {**COMPUTED, **COMPUTED_GRPO, **COMPUTED_SFT}.get(key)

    def whole(self, key: str) -> int:
        """The value of ``key`` as an integer. Raises UserError if it is none."""
        return int(self.number(key, integer=True))

    def number(self, key: str, *, integer: bool = False) -> float:
        """The value of ``key`` as a number. Raises UserError if it is none."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (integer and value != int(value)):
            raise UserError(f"{key}: expected {'an integer' if integer else 'a number'}, got {value!r}")
        return value

    def is_on(self, key: str) -> bool:
        """The value of ``key`` as a switch. Raises UserError if it is none."""
        value = self.get(key)
        text = str(value).lower()
        if value is None or text in ("false", "no", "off", "0"):
            return False
        if text in ("true", "yes", "on", "1"):
            return True
        raise UserError(f"{key}: expected true or false, got {value!r}")

    def put(self, place: str, value: Any, source: str = "") -> None:
        """Write ``value`` at a place of the recipe, such as ``rollout.temperature``."""
        *outer, last = place.split(".")
        here = self.recipe
        for part in outer:
            here = here.setdefault(part, {})
        here[last] = value
        if source:
            self.sources[tuple(place.split("."))] = source

    def carry(self, key: str, carried: Carried) -> None:
        """Write a key's value at its place, or TRL's default where that is not ours."""
        if self.has(key):
            value = self.is_on(key) if isinstance(carried.default, bool) else self.get(key)
            self.put(carried.place, value, key)
            self.carried.append((key, carried.place))
            return
        self.seen.add(key)
        if carried.default is not None and carried.default != our_default(carried.place):
            self.default(carried.place, carried.default)

    def default(self, place: str, value: Any, why: str = "") -> None:
        """Write what TRL takes where nothing is said, because ours is another; and say so."""
        self.put(place, value)
        ours = our_default(place)
        text = "" if ours is None else f"; ours is {_plain(ours)}"
        self.defaults.append((place, f"{_plain(value)}{text}{'. ' + why if why else ''}"))

    def change(self, keys: str, text: str) -> None:
        """Say that one or several keys (for a person) became something else."""
        self.changed.append((keys, text))

    def leave(self, key: str, why: str) -> None:
        """Say that a given key has no place here."""
        self.seen.add(key)
        if self.has(key):
            self.left.append((key, why))

    def fill(self, place: str, value: Any, what: str) -> None:
        """Write a value that stands for what TRL is given in code, to be replaced."""
        self.put(place, value)
        self.to_fill.append((place, what))

    def steps(self, optimizer_steps: float) -> int:
        """Steps of ours that hold so many optimizer steps, rounded up."""
        algorithm = self.recipe.get("algorithm", {})
        per_step = algorithm.get("num_minibatches", 1) * algorithm.get("num_iterations", 1)
        return math.ceil(optimizer_steps / per_step)


def convert(
    given: dict[str, Any],
    *,
    stage: Stage | None = None,
    num_processes: int | None = None,
    rows: int | None = None,
) -> Conversion:
    """The recipe that does what a configuration of TRL's says.

    ``stage`` is ``grpo`` or ``sft``; None finds out by the keys. ``num_processes`` is how many processes TRL's run has
    (None: one), ``rows`` how many rows it trains on, from which the length of an epoch follows.

    Raises UserError where a value can't be what its key wants.
    """
    if stage is None:
        stage = "sft" if ONLY_SFT & given.keys() and not ONLY_GRPO & given.keys() else "grpo"
    found = Conversion(dict(given), stage, num_processes, rows)
    found.put("stage", stage)
    model.convert_model(found)
    model.convert_data(found)
    if stage == "grpo":
        environment.convert_environment(found)
        sampling.convert_rewards(found)
        sampling.convert_rollout(found)
    tables = {**CARRIED, **(CARRIED_GRPO if stage == "grpo" else CARRIED_SFT)}
    for key, carried in tables.items():
        if key not in found.seen:
            found.carry(key, carried)
    length.convert_batch(found)
    if stage == "grpo":
        sampling.convert_algorithm(found)
    elif found.given.get("loss_type") not in (None, "nll", "chunked_nll"):
        found.leave("loss_type", "supervised training here is the mean cross-entropy of the completions' tokens")
    else:
        found.seen.add("loss_type")
    length.convert_length(found)
    length.convert_rhythm(found)
    _leave_the_rest(found)
    found.recipe = {key: found.recipe[key] for key in Recipe.model_fields if key in found.recipe}
    _check(found)
    return found


def our_default(place: str) -> Any:
    """The default of a key of the recipe, given as ``section.key``."""
    section, _, key = place.rpartition(".")
    field_ = sections()[section].model_fields[key]
    return None if field_.is_required() else field_.get_default(call_default_factory=True)


def _leave_the_rest(found: Conversion) -> None:
    """Every given key that nothing has taken: those without a place, those of the other stage, and unknown ones."""
    known = known_keys()
    mentioned = _mentioned(found)
    for key, value in found.given.items():
        if key in found.seen:
            if key not in mentioned and key not in found.at_default:
                found.at_default.append(key)
        elif key.startswith("_"):
            found.at_default.append(key)  # TrainingArguments' own state, which `to_json_string` writes too
        elif key in NO_PLACE:
            says_nothing = value in (None, False, "", [], {}) or value == 0
            if says_nothing or value == DEFAULTS_WITHOUT_PLACE.get(key):
                found.at_default.append(key)
            else:
                found.left.append((key, NO_PLACE[key]))
        elif value is None:
            found.at_default.append(key)
        elif key in known:
            found.left.append((key, f"has no meaning with stage {found.stage}"))
        else:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; {ours}" if (ours := foreign(key)) else ""
            found.left.append((key, f"no key of TRL's{hint}"))


def _mentioned(found: Conversion) -> set[str]:
    """Every word that the lists of what became of keys are headed by."""
    heads = (found.carried, found.changed, found.defaults, found.left)
    return {word for pairs in heads for pair in pairs for word in re.findall(r"\w+", " ".join(pair))}


def _check(found: Conversion) -> None:
    """Raise UserError where the recipe does not validate: a value of the file is not what its key wants."""
    try:
        Recipe.model_validate(found.recipe)
    except ValidationError as error:
        origins = {path: Origin(0, key) for path, key in found.sources.items()}
        origins[()] = Origin(0, "as a recipe")
        problems = problems_of(error, found.recipe, origins)
        raise UserError("\n".join(dict.fromkeys(f"{origin.text}: {text}" for origin, text in problems))) from None


def _as_value(given: Any) -> Any:
    """A text that YAML reads as a number, a boolean or null, as that; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        value = parse(given).value
    except YamlError:
        return given
    return value if isinstance(value, (int, float, bool)) else given


def _plain(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
