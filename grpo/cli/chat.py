"""``grpo chat``: a run's model answers questions, as it was asked in training."""

from __future__ import annotations

import itertools
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.arguments import Overrides, Trust, inside
from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.config import Recipe, RowsConfig
from grpo.config.load import load_recipe
from grpo.errors import UserError, printable
from grpo.run.owner import check_own_code

if TYPE_CHECKING:
    from grpo.cli.answer import Answerer

DIM, RESET = "\x1b[2m", "\x1b[0m"
TAGS = {False: "<think>", True: "</think>"}  # what ends a part: by whether it is thinking
LEAST_COLUMNS = 100  # of a terminal that shows two answers side by side


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    overrides: Overrides = None,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Another model answers beside it; `base` is the one the run began with."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy. Default: evaluation.temperature.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer. Default: rollout.max_completion_length.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first answer's draws; the next has the next one.")] = 0,
    source: Annotated[
        str | None, typer.Option(metavar="LABEL", help="With data.mix: whose template. Default: the first source's.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Ask a run's final model questions, each by itself, in the prompt template that it was trained with.

    A line in is a question; the end of input ends it. Thinking is dimmed on a terminal.
    """
    with exit_codes():
        run = run.expanduser()
        recipe = load_recipe(inside(run, "recipe.yaml", "is not a run folder"), overrides or [])
        final = inside(run, "final", "has no final model yet")
        recipe = model_and_template(recipe, source)
        if recipe.environment is not None:
            tell("Its environment is not played here: the model has no tools, and answers in one turn.", err=True)
            recipe = recipe.model_copy(update={"environment": None})
        if not trust:
            check_own_code(run, recipe)
    with exit_codes():
        try:
            from grpo.cli.answer import Answerer

            names = {"final": str(final)}
            if compare:
                names[compare] = recipe.model.name if compare == "base" else compare
            answerers = {}
            for label, name in names.items():
                try:
                    answerers[label] = Answerer(recipe, name, temperature=temperature, max_tokens=max_tokens)
                except UserError as error:  # it knows nothing of --compare
                    given = f"--compare {compare}" if name == compare else "model.name"
                    raise UserError(str(error).replace("model.name", given, 1)) from None
            for number, question in enumerate(questions(asked_in_training(run, recipe.data.template))):
                ask(answerers, question, seed + number)
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            tell("stopped by Ctrl-C", err=True)
            raise typer.Exit(130) from None


def model_and_template(recipe: Recipe, label: str | None = None) -> Recipe:
    """The recipe without what a chat does not execute: rewards, a loss, a task, a backend of the user's own. With
    `data.mix` it has the template of the source of this label, or the first one's."""
    sources = {source.label: source.rows for source in recipe.data.sources()}
    if label is not None and label not in sources:
        raise UserError(
            f"--source: the run has no source {label!r} (there are: {', '.join(filter(None, sources)) or 'none'})"
        )
    chosen = sources[label] if label is not None else next(iter(sources.values()))
    template = {key: getattr(chosen, key) for key in RowsConfig.model_fields}
    algorithm = recipe.algorithm.model_copy(update={"loss_type": "dapo"})
    rollout = recipe.rollout.model_copy(update={"backend": "hf", "vllm_python": None})
    data = recipe.data.model_copy(update=template | {"name": None, "mix": []})
    return recipe.model_copy(update={"rewards": [], "algorithm": algorithm, "rollout": rollout, "data": data})


def asked_in_training(run: Path, template: str) -> str | None:
    """A held-out question, in the form in which the model knows them. None where none was kept or it has several lines,
    and with a chat's template, whose text is not the question's alone."""
    from grpo.prompts.templates import PLAIN_TEMPLATES
    from grpo.run.read import read_rollouts

    files = sorted((run / "rollouts").glob("eval_*.jsonl"))
    row = next(read_rollouts(files[-1]), None) if files else None
    if row is None or template not in PLAIN_TEMPLATES:
        return None
    before, _, after = PLAIN_TEMPLATES[template][0].partition("{question}")
    text = str(row.get("prompt", ""))
    question = text.removeprefix(before).removesuffix(after)
    return question if text == before + question + after and "\n" not in question else None


def questions(example: str | None = None) -> Iterator[str]:
    """Lines of standard input that are not blank, asked for where a person types them."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        tell("One question a line, each by itself. Ctrl-D ends.", err=True)
        if example:
            tell(f"It was asked in training: {example}", err=True)
    while True:
        if is_typed:
            tell("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.removesuffix("\n")


def ask(answerers: dict[str, Answerer], question: str, seed: int) -> None:
    """Print every model's answer to a question."""
    on_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns
    if len(answerers) > 1 and on_terminal and width >= LEAST_COLUMNS:
        sides = []
        for label, answerer in answerers.items():
            pieces: list[str] = []
            prefill: list[str] = []
            end = answerer.answer(question, seed, pieces.append, begin=prefill.append)
            lines = wrapped("".join(pieces) + (f"\n({end})" if end else ""), width // 2 - 2)
            sides.append(columns([label, *lines], width // 2, thinking=is_thinking("".join(prefill))))
        for left, right in itertools.zip_longest(*sides, fillvalue=" " * (width // 2)):
            sys.stdout.write(f"{left}{right}".rstrip() + "\n")
        return
    for label, answerer in answerers.items():
        if len(answerers) > 1:
            tell(f"{label}:")
        show = Shown(sys.stdout, dims=on_terminal)
        end = answerer.answer(question, seed, show.feed, begin=show.begin)
        show.end()
        if end:
            tell(f"({end})", err=True)


class Shown:
    """An answer on its way to the screen, in pieces. Control characters become escapes; what is between ``<think>`` and
    ``</think>`` is dimmed, where ``dims``."""

    def __init__(self, to: Any, *, dims: bool):
        self.to, self.dims = to, dims
        self.thinking, self.held = False, ""

    def begin(self, prefill: str) -> None:
        """``prefill`` is what the prompt has already written of the answer."""
        self.thinking = is_thinking(prefill)

    def feed(self, piece: str) -> None:
        self.held += piece
        while (tag := TAGS[self.thinking]) in self.held:
            before, _, self.held = self.held.partition(tag)
            self._write(before + tag if self.thinking else before)
            self.thinking = not self.thinking
            if self.thinking:
                self._write(tag)
        kept = next((n for n in range(min(len(tag) - 1, len(self.held)), 0, -1) if tag.startswith(self.held[-n:])), 0)
        ready, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        self._write(ready)

    def end(self) -> None:
        self._write(self.held)
        self.held = ""
        self.to.write("\n")
        self.to.flush()

    def _write(self, text: str) -> None:
        if text:
            shown = printable(text)
            self.to.write(f"{DIM}{shown}{RESET}" if self.dims and self.thinking else shown)
            self.to.flush()


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters, in which nothing steers a terminal."""
    lines = printable(text).replace("\t", "    ").split("\n")
    return [part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]


def columns(lines: list[str], width: int, *, thinking: bool) -> list[str]:
    """Printable lines filled up to ``width``, with the thinking dimmed; the first line is a heading. ``thinking`` is
    whether the second one begins in it."""
    heading, *lines = lines
    filled = [heading.ljust(width)]
    for line in lines:
        shown, rest = "", line
        while (tag := TAGS[thinking]) in rest:
            before, _, rest = rest.partition(tag)
            shown += f"{DIM}{before}{tag}{RESET}" if thinking else f"{before}{DIM}{tag}{RESET}"
            thinking = not thinking
        shown += f"{DIM}{rest}{RESET}" if thinking and rest else rest
        filled.append(shown + " " * (width - len(line)))
    return filled


def is_thinking(prefill: str) -> bool:
    """Whether an answer begins in its thinking: by what the prompt has already written of it."""
    return prefill.rfind("<think>") > prefill.rfind("</think>")
