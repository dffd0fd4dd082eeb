"""A chain's file into its stages, each with its resolved recipe, or one message with all that is wrong with them.

Nothing heavy is imported: a mistake in the last stage is told before the first begins, without torch.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo.config import Recipe
from grpo.config.base import Section
from grpo.config.chain import KINDS, Chain, MeasureConfig, StageConfig
from grpo.config.find import SHIPPED, find_recipe
from grpo.config.hints import sections
from grpo.config.load import load_recipe, override_all, read_mapping
from grpo.config.problems import (
    NOUNS,
    Finding,
    Origin,
    bound_or_choice,
    origin_of,
    placed,
    problems_in,
    show,
    value_path,
    with_key,
)
from grpo.config.yaml_text import KeyPath
from grpo.errors import UserError
from grpo.pipeline.keep import parse_rules, window
from grpo.run.named_files import code_files

log = logging.getLogger("grpo")

CHAINS = SHIPPED / "chains"
START = "start"  # the name under which the model is measured that the first stage begins with
NAME = re.compile(r"[A-Za-z0-9_-]+")
ARTICLE = {"model": "a model", "rows": "rows"}
OUTPUTS = {"model": "run/final", "rows": "rows.jsonl"}  # within a stage's folder


@dataclass(frozen=True)
class Stage:
    """A stage of a chain: its folder, and the recipe as the stage's process will read it (``file``, ``overrides``)."""

    name: str
    config: StageConfig
    folder: Path
    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def output(self) -> Path | None:
        """The model or the rows that it makes."""
        return self.folder / OUTPUTS[self.config.makes] if self.config.makes else None


@dataclass(frozen=True)
class Measure:
    """The held-out tasks on which models are measured: the recipe, as the process will read it."""

    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    seeds: tuple[int, ...]
    form: str | None


@dataclass(frozen=True)
class Plan:
    file: Path
    chain: Chain
    stages: list[Stage]
    measure: Measure | None

    @property
    def folder(self) -> Path:
        return Path(self.chain.output_dir)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)


def load_chain(given: str, overrides: Sequence[str] = ()) -> Plan:
    """Read a chain, a file or the name of one that grpo ships, and every recipe in it.

    Raises UserError with everything that is wrong, one a line, each with its stage.
    """
    file = find_chain(given)
    chain = _read(file, overrides)
    problems: list[str] = []
    stages = []
    for name, config in chain.stages.items():
        found = list(_wrong_inputs(name, config, chain))
        try:
            stage = _stage(name, config, chain, file)
        except UserError as error:
            found += str(error).splitlines()
        else:
            found += _wrong_recipe(stage)
            stages.append(stage)
        problems += [f"stage {name}: {line}" for line in found]
    measure = None
    if chain.evaluate is not None:
        try:
            measure = _measure(chain, file)
        except UserError as error:
            problems += [f"evaluate: {line}" for line in str(error).splitlines()]
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    if measure is not None and measure.form is not None:
        _warn_of_paid_form(measure, stages)
    return Plan(file, chain, stages, measure)


def find_chain(given: str) -> Path:
    """The file that ``given`` means: a file, or the name of a chain that grpo ships. Raises UserError."""
    path = Path(given).expanduser()
    if file := next((file for file in (path, Path(f"{path}.yaml")) if file.is_file()), None):
        return file
    shipped = {file.stem: file for file in sorted(CHAINS.glob("*.yaml"))}
    stem = path.name.removesuffix(".yaml")
    if path.parent in (Path(), Path("chains"), Path("recipes/chains")) and stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, n=1)
    there = f", did you mean {near[0]}?" if near else f"; grpo ships {', '.join(shipped) or 'none'}"
    raise UserError(f"{given}: no such file or chain{there}")


# --- the file --------------------------------------------------------------------------------------------------------


def _read(file: Path, overrides: Sequence[str]) -> Chain:
    value, origins, problems = read_mapping(file, "a chain", ("output_dir:", "evaluate:", "stages:"))
    problems += override_all(value, origins, overrides)
    try:
        chain = Chain.model_validate(value)
    except ValidationError as error:
        problems += _problems(error, value, origins)
    if problems:
        lines = dict.fromkeys(f"{origin.text}: {message}" for origin, message in sorted(problems))
        raise UserError("\n".join(lines))
    return chain


def _problems(error: ValidationError, value: dict[str, Any], origins: dict[KeyPath, Origin]) -> Iterator[Finding]:
    for detail in error.errors(include_url=False):
        path, kind = value_path(detail, value), detail["type"]
        if kind == "value_error":
            yield from (placed(problem, detail, value, origins) for problem in problems_in(detail))
            continue
        if kind == "extra_forbidden":
            message = f"unknown key{_nearest(str(path[-1]), _keys(path[:-1]))}"
        elif kind == "missing":
            message = "missing"
        elif kind in NOUNS:
            message = f"expected {NOUNS[kind]}, got {show(detail['input'])}"
        else:
            message = bound_or_choice(path, detail)
        yield origin_of(path, origins), with_key(path, message, origins)


def _keys(path: KeyPath) -> list[str]:
    """The keys of the section at ``path``."""
    section: type[Section] = Chain if not path else MeasureConfig if path == ("evaluate",) else StageConfig
    return [field.alias or name for name, field in section.model_fields.items()]


def _nearest(typed: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(typed, known, n=1)
    return f", did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


# --- a stage ---------------------------------------------------------------------------------------------------------


def _wrong_inputs(name: str, config: StageConfig, chain: Chain) -> Iterator[str]:
    """What is wrong with a stage's name, and with the names of its inputs."""
    if not NAME.fullmatch(name) or name == START:
        yield f"a name is of letters, digits, _ and -, and not {START}: it is the stage's folder"
    before = list(chain.stages)[: list(chain.stages).index(name)]
    for what, other in config.inputs.items():
        wanted = "rows" if what == "rows" else "model"
        fitting = [one for one in before if chain.stages[one].makes == wanted]
        if other not in fitting:
            there = f"there are {', '.join(fitting)}" if fitting else "there is none"
            yield f"{what}: {other} is no stage before this one that makes {ARTICLE[wanted]} ({there})"


def _stage(name: str, config: StageConfig, chain: Chain, file: Path) -> Stage:
    folder = Path(chain.output_dir) / name
    overrides = [] if chain.seed is None else [f"training.seed={chain.seed}"]
    overrides += ["data.train_size=null"] if config.rows else []  # the recipe's is of its own source
    overrides += as_overrides(config.overrides)
    for what, other in config.inputs.items():
        made = Path(chain.output_dir) / other / OUTPUTS["rows" if what == "rows" else "model"]
        overrides += _input(what, json.dumps(str(made)), trains=config.makes == "model")
    overrides.append(f"training.output_dir={json.dumps(str(folder / 'run'))}")
    recipe_file = _recipe_file(config.recipe, file)
    return Stage(name, config, folder, recipe_file, tuple(overrides), load_recipe(recipe_file, overrides))


def _input(what: str, path: str, *, trains: bool) -> list[str]:
    """The overrides by which a recipe takes another stage's model or rows."""
    if what == "rows":
        return ["data.mix=[]", "data.name=null", "data.hub=null", f"data.path={path}", "data.args={}"]
    if what == "teacher":
        return ["teacher.url=null", "teacher.column=null", f"teacher.name={path}"]
    return _of_model(path) if not trains else ["model.revision=null", f"model.name={path}"]


def _of_model(path: str) -> list[str]:
    """As ``Recipe.with_model``: a model that is sampled from as it is."""
    return ["model.revision=null", "model.lora=null", "model.load_in_4bit=false", f"model.name={path}"]


def _recipe_file(given: str, chain: Path) -> Path:
    """A recipe's file: beside the chain's, or as on the command line."""
    beside = chain.parent / Path(given).expanduser()
    return beside if beside.is_file() else find_recipe(given)


def as_overrides(given: Mapping[str, Any]) -> list[str]:
    """Overrides as on the command line. A section may be a mapping of its keys."""
    found = []
    for key, value in given.items():
        if isinstance(value, dict) and key in sections():
            found += as_overrides({f"{key}.{name}": item for name, item in value.items()})
        else:
            found.append(f"{key}={json.dumps(value, ensure_ascii=False)}")
    return found


def _wrong_recipe(stage: Stage) -> Iterator[str]:
    """What is wrong with a stage's recipe for its kind."""
    config, recipe = stage.config, stage.recipe
    kind = KINDS[config.kind]
    if recipe.stage not in kind.stages:
        yield f"kind: {config.kind} needs a recipe with stage: {kind.stages[0]}; {stage.file} has {recipe.stage}"
    if config.kind == "distill" and config.teacher is None and getattr(recipe, "teacher", None) is None:
        yield f"kind: distill needs teacher: STAGE, or a recipe with a teacher section ({stage.file} has none)"
    if config.kind in ("sample", "filter", "eval") and not recipe.functions():
        yield f"kind: {config.kind} judges by the recipe's rewards, and {stage.file} has none"
    elif config.kind == "sample":
        try:
            parse_rules(config.rules, recipe)
        except UserError as error:
            yield from (line.replace("--keep", "keep:", 1) for line in str(error).splitlines())
    if config.kind == "filter" and recipe.data.mix:
        yield "kind: filter makes one file of rows, and data.mix has several sources: filter each by a stage of its own"
    if config.kind == "eval" and not recipe.data.held_out():
        yield "data.eval_size is 0: there is nothing to evaluate on"
    if config.pass_rate is not None:
        try:
            window(config.pass_rate)
        except ValueError as error:
            yield f"pass_rate: {error}"
    yield from _missing_files(recipe, made="data.path" if config.rows else None)


def _missing_files(recipe: Recipe, made: str | None = None) -> Iterator[str]:
    for source in recipe.data.sources():
        for key in ("path", "eval_path"):
            value, where = getattr(source.rows, key), f"{source.where}.{key}"
            if value and where != made and not Path(value).is_file():
                yield f"{where}: there is no file {value}"
    try:
        code_files(recipe)
    except UserError as error:
        yield from str(error).splitlines()


def _measure(chain: Chain, file: Path) -> Measure:
    config = chain.evaluate
    assert config is not None
    recipe_file = _recipe_file(config.recipe, file)
    overrides = (*as_overrides(config.overrides), 'training.output_dir="unused"')
    recipe = load_recipe(recipe_file, overrides)
    problems = list(_missing_files(recipe))
    if not recipe.data.held_out():
        problems.append("data.eval_size is 0: there is nothing to evaluate on")
    if not recipe.functions():
        problems.append(f"{recipe_file} has no rewards, which judge")
    if config.form is not None and config.form not in recipe.reward_names():
        problems.append(
            f"form: the recipe has no reward {config.form!r} (there are {', '.join(recipe.reward_names())})"
        )
    if problems:
        raise UserError("\n".join(problems))
    return Measure(recipe_file, overrides, recipe, tuple(config.seeds), config.form)


def _warn_of_paid_form(measure: Measure, stages: Sequence[Stage]) -> None:
    rewards = dict(zip(measure.recipe.reward_names(), measure.recipe.functions(), strict=True))
    form = rewards[str(measure.form)]
    paid = [
        stage.name
        for stage in stages
        if stage.config.makes == "model"
        and stage.recipe.stage == "grpo"
        and any((r.name, r.path) == (form.name, form.path) and r.weight for r in stage.recipe.functions())
    ]
    if paid:
        log.warning(
            "evaluate.form: %s is a reward with a weight in %s: what is reported as form is what was paid for there",
            measure.form,
            ", ".join(paid),
        )
