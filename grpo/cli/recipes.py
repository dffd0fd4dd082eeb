"""``grpo recipes``: the recipes that grpo ships, as a list, one by one, or copied to a file."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.config.find import shipped_recipe, shipped_recipes
from grpo.config.yaml_text import parse
from grpo.errors import UserError

app = typer.Typer(
    help="List the recipes that grpo ships, show one, or copy one.", add_completion=False, rich_markup_mode=None
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A recipe's name, as `grpo recipes` lists it.", show_default=False)
]


@dataclass(frozen=True)
class Summary:
    """A recipe in a line. ``about`` is the first line of its file; ``base`` the recipe to run before it, if any."""

    name: str
    stage: str
    model: str
    hardware: str
    about: str
    base: str | None


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes() -> None:
    """List the recipes: stage, size of the model, hardware, purpose."""
    with exit_codes():
        summaries = summarize_recipes()
    columns = [[getattr(s, key) for s in summaries] for key in ("name", "stage", "model", "hardware")]
    widths = [max(map(len, column)) for column in columns]
    # A screen gets lines that fit; a file or a pipe gets whole lines, to search in.
    room = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None
    for summary, *cells in zip(summaries, *columns, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        tell(_cut(f"{line}  {summary.about}", room))  # not in exit_codes: `| head` closes the pipe
    tell("grpo recipes show NAME, grpo recipes copy NAME [TO], grpo train NAME", err=True)


@app.command()
def show(name: NameArgument) -> None:
    """Print a recipe."""
    with exit_codes():
        text = shipped_recipe(name).read_text(encoding="utf-8")
    tell(text, nl=False)


@app.command()
def copy(
    name: NameArgument,
    to: Annotated[
        str | None,
        typer.Argument(metavar="TO", help="File or folder to copy to. Default: NAME.yaml, here.", show_default=False),
    ] = None,
) -> None:
    """Copy a recipe, to change it. A file that exists is not overwritten."""
    with exit_codes():
        source = shipped_recipe(name)
        target = Path(to or source.name)
        if target.is_dir():
            target /= source.name
        if "=" in target.name:
            raise UserError(f"{to}: copy takes no overrides; edit the copy, or give them to grpo train")
        try:
            with target.open("xb") as file:
                file.write(source.read_bytes())
        except FileExistsError:
            other = f"grpo recipes copy {name} OTHER.yaml"
            raise UserError(f"{target}: exists, and is not overwritten; copy to another file: {other}") from None
        except FileNotFoundError:
            raise UserError(f"{target}: there is no folder {target.parent}; make it first") from None
        except OSError as error:
            raise UserError(f"{target}: cannot be written: {error.strerror}") from None
        base = next((summary.base for summary in summarize_recipes() if summary.name == source.stem), None)
        if base:
            tell(f"{target} starts from what another recipe makes, so first: grpo train {base}")
        tell(f"{target} is yours to edit; then: grpo validate {shlex.quote(str(target))}")
        tell(f"to train: grpo train {shlex.quote(str(target))}")


def summarize_recipes() -> list[Summary]:
    """Every shipped recipe, in the order of their names."""
    texts = {name: file.read_text(encoding="utf-8") for name, file in shipped_recipes().items()}
    contents = {name: parse(text).value for name, text in texts.items()}
    maker = {content["training"]["output_dir"]: name for name, content in contents.items()}
    return [
        Summary(
            name=name,
            stage=content.get("stage", "grpo"),
            model=_model_size(content, contents, maker),
            hardware=_hardware(texts[name]),
            about=texts[name].partition("\n")[0].removeprefix("#").strip(),
            base=maker.get(_run_of(content["model"]["name"])),
        )
        for name, content in contents.items()
    ]


def _run_of(model: str) -> str:
    return model.removesuffix("/final")


def _model_size(content: dict[str, Any], contents: dict[str, dict[str, Any]], maker: dict[str, str]) -> str:
    """``0.5B`` or ``tiny``: from the model's name, or from that of the model that the recipe before it starts from."""
    model = content["model"]["name"]
    if before := maker.get(_run_of(model)):
        return _model_size(contents[before], contents, maker)
    size = re.search(r"(?<![\w.])\d+(\.\d+)?[bm](?![a-z])", model.lower())
    return size.group().upper() if size else "tiny" if "tiny" in model else Path(model).name


def _hardware(text: str) -> str:
    """``GPU 24 GB`` or ``CPU 2 GB``, from the header's line on hardware."""
    line = re.search(r"^# +hardware:? +(.*)", text, re.MULTILINE | re.IGNORECASE)
    found = re.search(r"\b(GPU|CPU)\b.*?\b(\d+ GB)\b", line.group(1)) if line else None
    return " ".join(found.groups()) if found else "?"


def _cut(line: str, room: int | None) -> str:
    return line if room is None or len(line) <= room else f"{line[: room - 1].rstrip(' ,:')}…"
