"""``grpo plan``: memory, disk, hours and dollars of a recipe, before it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli.arguments import Overrides, RecipeArgument, Trust, read_recipe
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.errors import UserError


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="CARD", help="24gb, 48gb, 80gb, h100, h200, or cpu: this machine.")
    ] = "cpu",
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="GPUs, each with a process of its own.")] = 1,
    fsdp2: Annotated[bool, typer.Option("--fsdp2", help="Shard weights over the GPUs (launch/fsdp2.yaml).")] = False,
    price: Annotated[float | None, typer.Option("--price", min=0, help="US dollars for an hour of one GPU.")] = None,
    length: Annotated[
        float | None, typer.Option("--length", min=1, help="Mean tokens of a completion. Default: half the longest.")
    ] = None,
    prompt_length: Annotated[
        float | None,
        typer.Option("--prompt-length", min=1, help="Mean tokens of a prompt. Default: half the longest."),
    ] = None,
    environment_length: Annotated[
        float | None,
        typer.Option("--environment-length", min=0, help="Mean tokens that an environment adds to a completion."),
    ] = None,
    signal: Annotated[
        float | None, typer.Option("--signal", min=0, max=1, help="Share of groups that are trained on. Default: 1.")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", metavar="FILE", help="The model's config.json, where it is not here.")
    ] = None,
    teacher_config: Annotated[
        str | None,
        typer.Option("--teacher-config", metavar="FILE", help="The config.json of teacher.name, where it is not here."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
    trust: Trust = False,
) -> None:
    """Say what a run takes before it begins: memory by part, disk, hours, dollars.

    For a GPU from the model's shape alone; for cpu, the real work is timed here for a few seconds.
    """
    with exit_codes():
        from grpo.model.shape import find_shape
        from grpo.plan.cards import CARDS
        from grpo.plan.plan import plan_for_gpus
        from grpo.plan.text import lines
        from grpo.plan.work import assumed_lengths

        resolved = read_recipe(recipe, overrides, trust)
        gpu = gpu.lower()
        if gpu != "cpu" and gpu not in CARDS:
            known = [f"{name} ({card.title})" for name, card in CARDS.items()]
            raise UserError(f"--gpu: {gpu} is not one of cpu (this machine), {', '.join(known)}")
        if gpu == "cpu" and (gpus > 1 or fsdp2):
            raise UserError(f"{'--gpus' if gpus > 1 else '--fsdp2'}: say which with --gpu: {', '.join(CARDS)}")
        if config and not Path(config).expanduser().exists():
            raise UserError(f"--config: {config}: no such file")
        shape = find_shape(config or resolved.model.name)
        lengths = assumed_lengths(
            resolved,
            prompt=prompt_length,
            completion=length,
            with_signal=signal,
            environment=environment_length,
        )
        named = teacher_config or (resolved.teacher.name if resolved.teacher is not None else None)
        teacher = find_shape(named, key="teacher.name", option="--teacher-config") if named else None
        if gpu == "cpu":
            from grpo.plan.here import plan_on_cpu

            found = plan_on_cpu(resolved, shape, lengths, price=price, teacher=teacher)
        else:
            options: dict[str, Any] = {"gpus": gpus, "fsdp2": fsdp2, "price": price, "teacher": teacher}
            found = plan_for_gpus(resolved, shape, CARDS[gpu], lengths, **options)
        if as_json:
            tell(json.dumps(found.as_json(), indent=2))
        else:
            for line in lines(found):
                tell(line)
