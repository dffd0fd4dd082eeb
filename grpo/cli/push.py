"""``grpo push``: a run's final model to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.errors import UserError


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a model's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or ORGANIZATION/NAME on the hub.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go, and its sizes; send nothing.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="For all to see. Default: a private repository.")] = False,
    rollouts: Annotated[bool, typer.Option("--rollouts", help="The completions of the run too.")] = False,
) -> None:
    """Push a run's final model with its card to the hub. Checkpoints, logs and recipe stay here."""
    with exit_codes():
        from grpo.run.read import no_run

        run = run.expanduser()
        if not run.is_dir():
            raise UserError(no_run(run))
        from grpo.run import push as pushing

        pushing.check_repository(repository)
        files = pushing.files_to_push(run, rollouts=rollouts)
        width = max(len(file.name) for file in files)
        for file in files:
            tell(f"{file.name:<{width}}  {file.size:>15,} bytes")
        total = f"{len(files)} files, {sum(file.size for file in files):,} bytes"
        where = f"{repository} ({'public' if public else 'private'})"
        if "README.md" not in {file.name for file in files}:
            tell(f"{run}: there is no model card (README.md) in it", err=True)
        if dry_run:
            tell(f"{total} would go to {where}; nothing was sent", err=True)
        else:
            url = pushing.push(files, repository, private=not public)
            tell(f"{total} are at {url}", err=True)
