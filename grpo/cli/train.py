"""``grpo train``: a run from a recipe, or with ``--dry-run`` the checks before one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo.cli.arguments import Overrides, RecipeArgument, Trust, not_empty, read_recipe
from grpo.cli.exit_codes import exit_codes
from grpo.cli.probe import PROMPTS, WILL_NOT_LEARN, run_probe
from grpo.cli.terminal import tell
from grpo.config.load import dump_given

if TYPE_CHECKING:
    from grpo.config import Recipe


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint that verifies.")] = False,
    resume_from: Annotated[
        str | None, typer.Option(metavar="PATH", callback=not_empty, help="Go on from this checkpoint.")
    ] = None,
    allow_changed_inputs: Annotated[
        bool,
        typer.Option(
            "--allow-changed-inputs", help="Go on although rows, model or your code changed since the checkpoint."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe and data, print the resolved recipe, train nothing.")
    ] = False,
    probe_first: Annotated[
        bool, typer.Option("--probe", help="Sample a few groups first, and train only where a run will learn.")
    ] = False,
    trust: Trust = False,
) -> None:
    """Train as RECIPE says, into its training.output_dir."""
    resume_from = resume_from and os.path.expanduser(resume_from)  # no shell does so behind an =
    with exit_codes():
        resolved = read_recipe(recipe, overrides, trust)
    with exit_codes(Path(resolved.training.output_dir)):
        if dry_run:
            check_before_training(resolved)
            tell(dump_given(resolved), nl=False)
            tell("# every other key has its default; docs/recipe.md lists them")
            return
        if not (resume or resume_from) and os.environ.get("WORLD_SIZE", "1") == "1":
            from grpo.run.folder import refuse_used

            refuse_used(Path(resolved.training.output_dir))  # a run asks again; here it is told before torch is loaded
        if probe_first and not (resume or resume_from) and not run_probe(resolved, recipe, overrides or [], PROMPTS):
            raise typer.Exit(WILL_NOT_LEARN)
        if resolved.stage == "sft":
            from grpo import sft

            sft.train(resolved, resume_from or resume, allow_changed_inputs=allow_changed_inputs)
        else:
            from grpo import trainer

            trainer.train(resolved, resume_from or resume, allow_changed_inputs=allow_changed_inputs)


def check_before_training(recipe: Recipe) -> None:
    """Everything that a run looks at before it loads weights: tokenizer, rows, prompts, rewards. Raises UserError."""
    from grpo.audit.at_start import warn_of_unpaid_answers
    from grpo.audit.rows import check_rows_at_start
    from grpo.backends import check_engine
    from grpo.environments.prepared import prepared
    from grpo.model.teacher import check_teacher
    from grpo.scoring.scorer import Scorer

    check_engine(recipe.rollout)
    with prepared(recipe) as (tokenizer, _, task, _), Scorer(recipe.functions(), recipe.scoring) as scorer:
        check_teacher(recipe, tokenizer)
        scorer.check_columns(task.columns)
        check_rows_at_start(recipe, task)
        warn_of_unpaid_answers(recipe, task, scorer)
