"""The ``grpo`` command: train, eval, validate, audit, report.

Nothing heavy is imported until a command has read its recipe. How commands end is in ``exit_codes.py``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo import __version__
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.config.load import dump_recipe, load_recipe
from grpo.errors import RunError, UserError
from grpo.user_code import import_ours

if TYPE_CHECKING:
    from grpo.config import Recipe

app = typer.Typer(
    name="grpo",
    help="GRPO training from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as rollout.temperature=0.8.", show_default=False),
]


def main() -> None:
    """Entry point of the ``grpo`` script and of ``python -m grpo``."""
    app(prog_name="grpo")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grpo {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    with exit_codes():
        import_ours()  # before anything imports another `data` or `rewards`
    _log_to_stderr()


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    resume_from: Annotated[str | None, typer.Option(metavar="PATH", help="Go on from this checkpoint.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, print the resolved recipe, train nothing.")
    ] = False,
) -> None:
    """Train as RECIPE says; everything is written to its training.output_dir."""
    with exit_codes():
        resolved = load_recipe(recipe, overrides or [])
    with exit_codes(Path(resolved.training.output_dir)):
        if dry_run:
            from grpo.audit.rows import unscorable_rows
            from grpo.run.session import prepare_task
            from grpo.scoring.scorer import Scorer

            _, _, task = prepare_task(resolved)
            with Scorer(resolved.rewards, resolved.scoring) as scorer:
                scorer.check_columns(task.columns)
                if unscorable := unscorable_rows(resolved, [task.train, task.held_out]):
                    raise UserError("\n".join(unscorable))
            typer.echo(dump_recipe(resolved), nl=False)
        elif resolved.stage == "sft":
            from grpo import sft

            sft.train(resolved, resume_from or resume)
        else:
            from grpo import trainer

            trainer.train(resolved, resume_from or resume)


@app.command("eval")
def evaluate(
    recipe_or_run: Annotated[str, typer.Argument(metavar="RECIPE_OR_RUN", help="A recipe file or a run folder.")],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Model to evaluate. Default: the run's final/, or model.name.")
    ] = None,
) -> None:
    """Evaluate a model on the held-out tasks of a recipe, or of the recipe that a run was made from."""
    run = Path(recipe_or_run)
    with exit_codes():
        if run.is_dir():
            recipe_or_run = str(_inside(run, "recipe.yaml", "is not a run folder"))
            model = model or str(_inside(run, "final", "has no final model yet; name another with --model PATH"))
        resolved = load_recipe(recipe_or_run, overrides or [])
    with exit_codes(run if run.is_dir() else None):
        from grpo.evaluate import evaluate_recipe

        found = evaluate_recipe(resolved, model)
        if is_first_of_node():
            width = max(map(len, found), default=0)
            for name, value in found.items():
                typer.echo(f"{name:<{width}}  {value:.6g}")


@app.command()
def validate(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE|KEY=VALUE", help="Recipe files, then overrides for them all.")
    ],
) -> None:
    """Check recipes and their data without loading weights or reaching for the network; one line each."""
    files = [a for a in recipes if "=" not in a or Path(a).exists()]
    overrides = [a for a in recipes if a not in files]
    failures = []
    with exit_codes():
        if not files:
            raise UserError(f"no recipe given, only overrides: {' '.join(overrides)}")
        for file in files:
            try:
                resolved = load_recipe(file, overrides)
            except UserError as error:
                failures.append(str(error))
                continue
            try:
                typer.echo(f"OK {file}{check_offline(resolved)}")
            except UserError as error:
                failures += [f"{file}: {line}" for line in str(error).splitlines()]
        if failures:
            raise UserError("\n".join(failures))


@app.command()
def audit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to try, of those to train on and held out.")] = 200,
    gold: Annotated[
        str | None,
        typer.Option("--gold", metavar="TEMPLATE", help="A right completion, for rewards of yours: '#### {answer}'."),
    ] = None,
) -> None:
    """Try the rewards of RECIPE on its rows: right answers must be paid, cheats must not."""
    with exit_codes():
        resolved = load_recipe(recipe, overrides or [])
        if not resolved.data.hub:
            os.environ["HF_HUB_OFFLINE"] = "1"  # the tokenizer is used if it is here, and not worth a wait
        from grpo.audit.audit import audit as audit_rewards

        findings = audit_rewards(resolved, rows, gold, typer.echo)
        if findings:
            raise RunError("\n".join([f"{recipe}: the rewards are not sound:", *(f"  {found}" for found in findings)]))
        typer.echo(f"OK {recipe}: nothing was found")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]) -> None:
    """Draw a run: PNG curves and one self-contained HTML page."""
    with exit_codes():
        _inside(run, "metrics.jsonl", "is not a run folder")
        from grpo.report.write import write_report

        typer.echo(write_report(run))


def check_offline(recipe: Recipe) -> str:
    """Check reward functions, rows and prompts with what is on this machine; says what there is and what is left.

    Raises UserError with everything found.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers and datasets are imported, which is below
    from grpo.audit.rows import check_data
    from grpo.backends import find_backend
    from grpo.losses import find_loss
    from grpo.run.session import prepare_task
    from grpo.scoring.scorer import Scorer

    note, problems, scorer = "", [], None
    for find in (lambda: find_loss(recipe.algorithm.loss_type), lambda: find_backend(recipe.rollout)):
        try:
            find()
        except UserError as error:
            problems.append(str(error))
    try:
        scorer = Scorer(recipe.rewards, recipe.scoring.model_copy(update={"workers": 1}))
    except UserError as error:
        problems.append(str(error))
    try:
        note = check_data(recipe, scorer)
        if not _has_tokenizer(recipe):
            source = recipe.model.tokenizer or recipe.model.name
            note += f"; prompts are checked when the run starts (no tokenizer of {source} on this machine)"
        elif not recipe.data.hub:
            prepare_task(recipe)
    except UserError as error:
        problems.append(str(error))
    finally:
        if scorer is not None:
            scorer.close()
    if problems:
        raise UserError("\n".join(problems))
    return note


def _has_tokenizer(recipe: Recipe) -> bool:
    from grpo.model.loading import load_configs, load_tokenizer

    try:
        load_tokenizer(recipe.model)
        load_configs(recipe.model)
    except UserError:
        return False
    return True


def _inside(run: Path, name: str, complaint: str) -> Path:
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder")
    if not (run / name).exists():
        raise UserError(f"{run}: {complaint} (there is no {name} in it)")
    return run / name


class _StderrHandler(logging.StreamHandler):
    """Writes to what ``sys.stderr`` is now: a progress display replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _log_to_stderr() -> None:
    for log in map(logging.getLogger, ("grpo", "rewards")):
        if not log.handlers:
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
            log.addHandler(handler)
        log.setLevel(logging.INFO if is_first_of_node() else logging.ERROR)
