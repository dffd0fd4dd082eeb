"""``grpo eval``: accuracy of a model on held-out tasks, and on suites."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.arguments import Overrides, Trust, inside, not_empty, read_recipe
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.cli.terminal import tell
from grpo.config import Recipe
from grpo.config.find import shipped_recipes
from grpo.config.load import is_key, recipe_of
from grpo.config.suites import find_suite
from grpo.errors import UserError
from grpo.run.owner import check_own_code

if TYPE_CHECKING:
    from grpo.evaluation.outside import Evaluated

log = logging.getLogger(__name__)


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_RUN",
            callback=not_empty,
            help="A run folder, or a recipe (a file or a name); with --suite also a model (a folder or a hub id).",
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=not_empty,
            help="Folder or hub id to evaluate. Default: the run's final/, or model.name.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME]",
            callback=not_empty,
            help="Suites, such as math500,humaneval or my_suite.yaml, in place of the held-out tasks.",
        ),
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows of the one suite: .jsonl, .parquet or .csv, as published.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where NAME.json and NAME.jsonl go. Default: eval/ of the run; of suites else eval/."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What the files are called. Default: as the model is.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Evaluate a model on a recipe's held-out tasks, or on a run's, and on suites.

    Counts, interval, settings and versions go into eval/NAME.json, every completion into eval/NAME.jsonl.
    Suites are those of evaluation.suites, or of --suite alone; evaluation.suite_sampling changes how they are sampled.
    A recipe is a program: it can name code. That of a run folder which you have not made here needs --trust.
    """
    run = Path(target).expanduser()
    is_run = run.is_dir() and (suite is None or (run / "recipe.yaml").exists())
    with exit_codes():
        from grpo.run.read import no_run, runs_nearby

        if is_run:
            if target in shipped_recipes():
                log.info("%s is a folder here, and is taken for a run, not for the recipe of that name", run)
            target = str(inside(run, "recipe.yaml", "is not a run folder"))
            model = model or str(inside(run, "final", "has no final model yet; name another with --model PATH"))
        alone = suite is not None and not is_run and not _is_recipe(target)
        try:
            resolved = _of_model(target, overrides) if alone else read_recipe(target, overrides, trust)
        except UserError:
            if not alone and not run.exists() and runs_nearby(run.parent):  # a run that is not there, and no recipe
                raise UserError(no_run(run)) from None
            raise
        if is_run and not trust:
            check_own_code(run, resolved)  # whatever the folder lacks
        if suite is not None:
            resolved = _with_suites(resolved, suite)
        elif rows is not None:
            raise UserError("--rows is the file of a suite: name it with --suite")
        if rows is not None and not rows.expanduser().is_file():
            raise UserError(f"--rows {rows}: no such file")
        template_given = any(word.startswith("data.template=") for word in overrides or [])
    with exit_codes(run if is_run else None):
        from grpo.evaluation.outside import evaluate_recipe

        folder = output.expanduser() if output else run / "eval" if is_run else Path("eval") if suite else None
        evaluated = model or resolved.model.name
        more: dict[str, Any] = {"held_out": False} if suite is not None else {}
        if rows is not None:
            more["rows"] = str(rows.expanduser())
        if alone:
            more |= {"data_known": False, "choose_template": not template_given}
        evaluate_recipe(resolved, model, on_result=lambda found: _tell(found, folder, name, evaluated), **more)


def _tell(found: Evaluated, folder: Path | None, name: str | None, model: str) -> None:
    """Print an evaluation, and write it into the folder, if there is one."""
    if not is_first_of_node():
        return
    if found.suite:
        tell(f"{found.suite}:")
    width = max(map(len, found.metrics), default=0)
    for metric, value in found.metrics.items():
        tell(f"{metric:<{width}}  {value:.6g}")
    if folder is None:
        tell("nothing is written without a run folder; --output FOLDER keeps numbers and samples", err=True)
    elif os.environ.get("RANK", "0") == "0":
        from grpo.run.evaluations import write_evaluation

        written = write_evaluation(
            folder, name, found.recipe, model, found.metrics, found.rows, suite=found.suite, facts=found.facts
        )
        tell(f"{written} and its samples, {written.with_suffix('.jsonl').name}", err=True)


# --- suites ----------------------------------------------------------------------------------------------------------


def _is_recipe(target: str) -> bool:
    """Whether it is a recipe rather than a model: a file of YAML, or the name of one of ours."""
    path = Path(target).expanduser()
    return path.suffix in (".yaml", ".yml") or target in shipped_recipes() or Path(f"{path}.yaml").is_file()


def _of_model(model: str, overrides: list[str] | None) -> Recipe:
    """A recipe of a model alone, for suites."""
    if is_key(model.partition("=")[0]):
        raise UserError(f"{model}: no model given, only an override; the model comes first")
    value = {
        "model": {"name": model},
        "data": {"name": "suite"},  # each suite has its own rows
        "rewards": [{"name": "math"}],
        "rollout": {"backend": "auto"},
        "training": {"output_dir": "eval", "prompts_per_step": int(os.environ.get("WORLD_SIZE", "1"))},
    }
    return recipe_of(value, f"model {model}", overrides or [])


def _with_suites(recipe: Recipe, given: str) -> Recipe:
    """The recipe with the suites of ``--suite``, which are known."""
    names = list(dict.fromkeys(part.strip() for part in given.split(",") if part.strip()))
    if not names:
        raise UserError("--suite names no suite")
    for name in names:
        find_suite(name)
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"suites": names})})
