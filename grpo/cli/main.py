"""The ``grpo`` command: the list of its commands, and what happens before any of them.

Nothing heavy is imported until a command has read its recipe. How commands end is in ``exit_codes.py``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Any

import typer

from grpo import __version__
from grpo.cli import (
    chat,
    checks,
    convert,
    data,
    evaluate,
    plan,
    probe,
    push,
    recipes,
    report,
    run,
    sample,
    score,
    train,
)
from grpo.cli.exit_codes import exit_codes, is_first_of_node
from grpo.cli.terminal import StderrHandler, output_taken
from grpo.config.hints import places
from grpo.config.load import as_overrides
from grpo.errors import UserError
from grpo.user_code import import_ours

app = typer.Typer(
    name="grpo",
    help="GRPO training from one YAML recipe.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text, which reads the same on a screen and in a file
)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("plan")(plan.plan)
app.command("probe")(probe.probe)
app.command("validate")(checks.validate)
app.command("audit")(checks.audit)
app.command("score")(score.score)
app.command("sample")(sample.sample)
app.command("run")(run.run)
app.command("measure", hidden=True)(run.measure)  # a stage of a chain starts it
app.command("report")(report.report)
app.command("watch")(report.watch)
app.command("compare")(report.compare)
app.command("chat")(chat.chat)
app.command("push")(push.push)
app.command("convert")(convert.convert)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")

WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]  # click's UsageError; typer has a click of its own


def main() -> None:
    """Entry point of the ``grpo`` script and of ``python -m grpo``."""
    try:
        with exit_codes():
            try:
                with output_taken():  # a command turns its own errors into an exit code: what is left prints help
                    code = app(prog_name="grpo", standalone_mode=False)
            except WrongUsage as error:
                written = as_overrides(sys.argv[1:])
                raise UserError("\n".join(written) or _in_one_line(error)) from None
    except typer.Exit as ending:
        code = ending.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _in_one_line(error: Any) -> str:
    command = error.ctx.command_path if error.ctx else "grpo"
    message = error.format_message().rstrip(".").replace("Input should be", "must be").split(", unable to parse")[0]
    if meant := _key_meant(error):  # nearer than the options that are spelt alike
        message = f"{error.message}; write {meant}"
    return f"{command}: {message[:1].lower()}{message[1:]} ({command} --help)"


def _key_meant(error: Any) -> str:
    """Of an option that does not exist, the keys of the recipe that it may mean: ``--max_steps``, ``--lr``."""
    option, command = getattr(error, "option_name", ""), error.ctx.command if error.ctx else None
    takes_keys = command is not None and any(parameter.name == "overrides" for parameter in command.params)
    keys = places(option.lstrip("-").replace("-", "_")) if option and takes_keys else []
    return " or ".join(f"{key}=VALUE" for key in keys)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"grpo {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)
    with exit_codes():
        try:
            os.getcwd()
        except FileNotFoundError:
            raise UserError("the folder in which grpo was started is not there any more; cd to one that is") from None
        import_ours()  # before anything imports another `data` or `rewards`
    _log_to_stderr()


def _log_to_stderr() -> None:
    for log in map(logging.getLogger, ("grpo", "rewards", "data")):
        if not log.handlers:
            handler = StderrHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
            log.addHandler(handler)
        log.setLevel(logging.INFO if is_first_of_node() else logging.ERROR)
