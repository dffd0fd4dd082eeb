"""How a command ends: what a person reads on stderr, and the exit code.

0 done; 2 the recipe, the data or the command line is wrong; 3 a probe says that a run would not learn; 143 preempted
and saved; 130 Ctrl-C, saved too where it can be; 1 anything else, with a last line that says what to do. Under a
launcher every process ends this way, and says no more than it has to.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from grpo.errors import Preempted, RunError, UserError, printable
from grpo.run import peers, stopping
from grpo.run.closed_output import output_is_closed

SECONDS_TO_SPEAK = 5.0
NOT_FOR_THIS_USER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP)


@contextmanager
def exit_codes(folder: Path | None = None) -> Iterator[None]:
    """Turn whatever a command raises into a message on stderr and its exit code.

    An unexpected exception's traceback goes to ``folder``/error.txt if that folder exists, else to stderr.
    """
    try:
        yield
    except typer.Exit:
        raise
    except UserError as error:
        peers.say_ended(str(error), code=2)
        _say_once(str(error))  # every process has read the same recipe
        raise typer.Exit(2) from None
    except Preempted as error:
        _say_once(str(error))
        raise typer.Exit(error.code) from None
    except RunError as error:
        peers.say_ended(_first_line(error))
        _say(f"{_rank_prefix()}{error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _say_once(stopping.NOW)
        raise typer.Exit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():  # `| head`: nobody listens
            raise typer.Exit(1) from None
        if lost := peers.loss():  # whatever was raised, it is what a collective made of that
            _say_once(f"{lost.text}\n{peers.ADVICE}")
            raise typer.Exit(lost.code) from None
        if isinstance(error, OSError) and error.errno in NOT_FOR_THIS_USER and error.filename is not None:
            message = f"{os.fsdecode(error.filename)}: {error.strerror}"
            peers.say_ended(message, code=2)
            _say_once(message)
            raise typer.Exit(2) from None
        peers.say_ended(f"{type(error).__name__}: {_first_line(error)}")
        where = _keep_traceback(folder)
        _say(f"{_rank_prefix()}{type(error).__name__}: {_first_line(error)}. {_advice(error)} {where}".rstrip())
        raise typer.Exit(1) from None


def _keep_traceback(folder: Path | None) -> str:
    """Save the current traceback, or print it where there is no folder to save it in; says where it is."""
    rank = os.environ.get("RANK", "0")
    if folder is not None and folder.is_dir():
        file = folder / ("error.txt" if rank == "0" else f"error_rank{rank}.txt")
        from grpo.run.secrets import scrubbed  # here: it imports our `rewards`, which must have been found first

        try:
            file.write_text(printable(scrubbed(traceback.format_exc())), encoding="utf-8")
            return f"The traceback is in {file}."
        except OSError as error:
            _say(f"cannot write {file}: {error.strerror}")
    _say(traceback.format_exc().rstrip())
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0].rstrip(".")


def _advice(error: BaseException) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            "Lower training.micro_batch_tokens (update) or rollout.max_batch_size (generation), "
            "or set model.gradient_checkpointing=true; then go on with --resume."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free some disk space, then go on with --resume."
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("grpo"):
        return f"Install the package that holds {error.name}."
    if isinstance(error, RuntimeError) and "Timed out waiting" in str(error):  # gloo's words
        return "Another process is there, but hangs or took longer than training.ddp_timeout; go on with --resume."
    return "This is no mistake in the recipe that grpo knows of: please report it. --resume goes on from a checkpoint."


def is_first_of_node() -> bool:
    """Whether this process writes the messages of its machine: the only one, or the first that a launcher started."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"[rank {rank}] "


def _say_once(message: str) -> None:
    """The first process says it. The others wait, since a launcher kills all of them as soon as one ends."""
    if is_first_of_node():
        _say(message)
    else:
        time.sleep(SECONDS_TO_SPEAK)


def _say(message: str) -> None:
    with suppress(OSError):  # the terminal is gone; the exit code says it too
        print(printable(message), file=sys.stderr, flush=True)
