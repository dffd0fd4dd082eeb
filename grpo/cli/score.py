"""``grpo score``: a file of completions, judged by one reward."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from grpo.cli.exit_codes import exit_codes
from grpo.cli.terminal import tell
from grpo.errors import UserError

if TYPE_CHECKING:
    from grpo.scoring.grade import Completion, Graded

SHOWN = 3  # rows without a reward, and wrong lines, that are spelled out


def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="A row a line, with its completion.")],
    reward: Annotated[
        str, typer.Option("--reward", metavar="NAME|file.py:fn", help="A built-in reward, or a function of yours.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Arguments of the reward, such as timeout=5.", show_default=False),
    ] = None,
    completion: Annotated[
        str, typer.Option("--completion", metavar="COLUMN", help="The column of the completions.")
    ] = "completion",
    column: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="What the reward calls NAME is in COLUMN: answer=gold."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write a line of JSON for each, with its verdict."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes. Default: as many as processors.")
    ] = None,
) -> None:
    """Score a file of completions: verdicts, counts, time.

    Needs no recipe, model or tokenizer. A row holds what the reward reads (math: answer), and may hold prompt, status
    (stop, length, error) and prefill.
    """
    with exit_codes():
        names = _renamed(column or [])
        from grpo.scoring.grade import grader

        with ExitStack() as stack:
            try:
                judge = stack.enter_context(grader(_config(reward, arguments or []), workers or os.cpu_count() or 1))
            except UserError as error:
                raise UserError(str(error).replace("rewards[0]", "--reward", 1)) from None
            rows = list(_rows(file, completion, names))
            _refuse([(line, why) for line, one in rows if (why := judge.problem_of(one))], file, len(rows))
            written = stack.enter_context(_opened(out)) if out is not None else None
            begun = time.perf_counter()
            summary = Summary(judge.spec.key, str(file))
            for (line, _), graded in zip(rows, judge.grade(one for _, one in rows), strict=True):
                summary.add(line, graded)
                if written is not None:
                    row = {"line": line, "reward": graded.reward, "verdict": graded.verdict, "detail": graded.detail}
                    written.write(json.dumps(row, ensure_ascii=False) + "\n")
            summary.seconds = time.perf_counter() - begun
        for said in summary.lines():
            tell(said)


@dataclass
class Summary:
    """Counts of verdicts, the mean reward, and the first rows without one."""

    reward: str
    file: str
    counts: Counter[str] = field(default_factory=Counter)
    values: list[float] = field(default_factory=list)
    unscored: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, line: int, graded: Graded) -> None:
        self.counts[graded.verdict] += 1
        if graded.reward is not None:
            self.values.append(graded.reward)
        else:
            why = (graded.detail.strip().splitlines() or [""])[-1]
            self.unscored.append(f"{self.file}:{line}: {graded.verdict}{': ' if why else ''}{why}")

    def lines(self) -> Iterator[str]:
        total = self.counts.total()
        rate = total / self.seconds if self.seconds else 0.0
        yield f"{self.reward}: {total} completions of {self.file} in {self.seconds:.2f} s ({rate:.0f} a second)"
        if self.values:
            yield f"  {'mean reward':<18}{sum(self.values) / len(self.values):.4f} of {len(self.values)} scored"
        for verdict, count in self.counts.most_common():
            yield f"  {verdict:<18}{count}  ({count / total:.1%})"
        for row in self.unscored[:SHOWN]:
            yield f"  {row}"
        if len(self.unscored) > SHOWN:
            yield f"  and {len(self.unscored) - SHOWN} more without a reward"


# --- what is asked for -----------------------------------------------------------------------------------------------


def _config(reward: str, arguments: list[str]) -> Any:
    from grpo.config import RewardConfig
    from grpo.config.yaml_text import YamlError, parse
    from grpo.user_code import is_place

    args: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        try:
            document = parse(text)
        except YamlError as error:
            raise UserError(f"{argument}: {error}") from None
        if not equals or not key.isidentifier() or document.problems:
            raise UserError(f"{argument}: write KEY=VALUE, such as timeout=5 or 'packages=[numpy]'")
        args[key] = document.value
    return RewardConfig(path=reward, args=args) if is_place(reward) else RewardConfig(name=reward, args=args)


def _renamed(given: list[str]) -> dict[str, str]:
    """By the column's name, what the reward calls it."""
    names: dict[str, str] = {}
    for pair in given:
        name, equals, column = pair.partition("=")
        if not (name and equals and column):
            raise UserError(f"--column {pair}: write NAME=COLUMN, such as answer=gold")
        names[column] = name
    return names


# --- the file --------------------------------------------------------------------------------------------------------


def _rows(file: Path, column: str, names: dict[str, str]) -> Iterator[tuple[int, Completion]]:
    """Line numbers and completions. Raises UserError with the first few lines that are none, and how many there are."""
    from grpo.scoring.grade import Completion

    found: list[tuple[int, Completion]] = []
    problems: list[tuple[int, str]] = []
    read = 0
    for number, line in _lines(file):
        read += 1
        row = _parsed(line)
        if isinstance(row, str):
            problems.append((number, row))
            continue
        if missing := [name for name in (column, *names) if name not in row]:
            problems.append((number, f"no column {missing[0]!r} (there are {', '.join(map(repr, row)) or 'none'})"))
            continue
        text = row[column]
        if not isinstance(text, str) and not _is_messages(text):
            problems.append((number, f"column {column!r} is neither a text nor messages"))
            continue
        others = {names.get(name, name): value for name, value in row.items() if name != column}
        prompt, status = others.pop("prompt", ""), others.pop("status", None) or "stop"
        prefill, ids = others.pop("prefill", None) or "", others.pop("completion_ids", None)
        if ids is not None and not isinstance(ids, list):
            problems.append((number, "column 'completion_ids' is no list"))
            continue
        found.append((number, Completion(text, prompt, others, str(status), str(prefill), ids)))
    _refuse(problems, file, read)
    if not read:
        raise UserError(f"{file}: no rows")
    yield from found


def _lines(file: Path) -> Iterable[tuple[int, bytes]]:
    try:
        with file.expanduser().open("rb") as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _parsed(line: bytes) -> dict[str, Any] | str:
    """A row, or what is wrong with its line."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"not valid JSON, or cut off ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return f"JSON that can't be read ({error})"
    return row if isinstance(row, dict) else "not an object of columns"


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _refuse(problems: list[tuple[int, str]], file: Path, total: int) -> None:
    if problems:
        shown = [f"  {file}:{line}: {why}" for line, why in problems[:SHOWN]]
        more = [f"  and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError("\n".join([f"{len(problems)} of {total} rows of {file} can't be scored:", *shown, *more]))


def _opened(out: Path) -> IO[str]:
    try:
        return out.expanduser().open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
