"""``grpo probe``: a few groups with the real model, before any training."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grpo.cli.arguments import Overrides, RecipeArgument, Trust, read_recipe
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.cli.terminal import tell
from grpo.errors import UserError

if TYPE_CHECKING:
    from grpo.config import Recipe
    from grpo.plan.probe import Probe

WILL_NOT_LEARN = 3  # exit code
PROMPTS = 64


def probe(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts to sample a group for.")] = PROMPTS,
    trust: Trust = False,
) -> None:
    """Sample and score a few groups before any training, and say whether a run will learn.

    Exit code 0: go. 3: what will go wrong is said, with a cure. Writes probe.json and probe.html into the run folder.
    """
    with exit_codes():
        resolved = read_recipe(recipe, overrides, trust)
        goes = run_probe(resolved, recipe, overrides or [], prompts)
    if not goes:
        raise typer.Exit(WILL_NOT_LEARN)


def run_probe(recipe: Recipe, given: str, overrides: list[str], prompts: int) -> bool:
    """Probe, print and write what was found; whether a run would learn. ``given`` is RECIPE as the user wrote it."""
    if recipe.stage != "grpo":
        raise UserError(f"{given}: stage is {recipe.stage}, and a probe is of rewards: there is nothing to sample")
    if not recipe.learns_from_rewards:
        raise UserError(f"{given}: it learns from its teacher alone, and a probe is of rewards: nothing to look for")
    from grpo.plan.probe import probe as sample
    from grpo.plan.probe_text import lines

    found = sample(recipe, prompts)
    if is_first_of_node():
        figures = found.figures
        known = f"--length {figures.mean_length:.0f} --prompt-length {figures.mean_prompt:.0f}"
        command = f"grpo plan {shlex.join([given, *overrides])} {known} --signal {figures.with_signal:.2f}"
        for line in lines(found, command):
            tell(line)
        _write(found, Path(recipe.training.output_dir), given)
    return found.goes


def _write(found: Probe, folder: Path, title: str) -> None:
    from grpo.files import write_whole
    from grpo.plan.probe_text import page

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "probe.json", json.dumps(found.as_json(), indent=2) + "\n")
        write_whole(folder / "probe.html", page(found, f"Probe of {title}"))
    except OSError as error:
        raise UserError(f"training.output_dir: cannot write {folder}: {error.strerror}") from None
    tell(f"written: {folder / 'probe.json'}, {folder / 'probe.html'}")
