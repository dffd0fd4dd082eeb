"""Which program a completion answers with: a fenced block after the thinking."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.tags import ANSWER, END_ANSWER, NoAnswer, after_thinking, single_answer

MAX_PROGRAM = 1 << 16  # characters
MAX_LINE = 200  # characters of a line that may open a fence
FENCE = re.compile(r"(?P<fence>`{3,}|~{3,})(?P<info>.*)")
PYTHON = re.compile(r"\{?\.?(?:python|py)[0-9.]*(?![\w-])")
GLUED = re.compile(r"[^`]+(?P<fence>`{3,})(?P<info>(?:python|py)[0-9.]*)")  # behind text: "Answer:```python"
# A line of a program, and hardly one of what a program prints, nor of a session (">>> f(1)").
STATEMENT = re.compile(
    r"(?!>>>)(?:import [\w.]+(?: as \w+| *,.*)?$|from [\w.]+ import |(?:async )?def \w+ ?\(|class \w+.*:"
    r"|.*\b(?:print|input) ?\(|.*\bsys\.std(?:in|out)\b)"
)


@dataclass
class Block:
    fence: str
    is_python: bool  # it says so
    lines: list[str]

    def closed_by(self, line: str) -> bool:
        """Whether a line is a fence of the same kind, at least as long, with nothing behind it but ``</answer>``."""
        line = line.strip().removesuffix(END_ANSWER).rstrip()
        return len(line) >= len(self.fence) and line == self.fence[0] * len(line)

    def close_behind_code(self) -> bool:
        """End the block at the first line that has its fence behind code, if there is one."""
        for number, line in enumerate(self.lines):
            code = line.rstrip().removesuffix(END_ANSWER).rstrip()
            if code.endswith(self.fence) and not code.endswith(f"{self.fence[0]}{self.fence}"):
                self.lines[number:] = [code.removesuffix(self.fence)]
                return True
        return False

    def defines(self, name: str) -> bool:
        """Whether a line defines a function of this name, plain or in a class."""
        defined = re.compile(rf"\s*(?:(?:async )?def {name}\b|{name}\s*(?::[^=]*)?=[^=])", re.ASCII)
        return any(defined.match(line) for line in self.lines)

    def is_program(self) -> bool:
        return self.is_python or any(STATEMENT.match(line.strip()[:MAX_LINE]) for line in self.lines)


def extract_program(text: str, fn_name: str | None = None) -> str:
    """The last fenced Python block after the thinking, dedented.

    A fence is a line that begins with three or more backticks or tildes, also directly behind ``<answer>``. The one
    that opens a block says ``python``, ``py`` or nothing, and the one that closes it is as long, or longer, and says
    nothing. Without any fence, what ``<answer>`` holds is the program where it has a line of one. A block that says
    nothing and holds no line of a program (what the program prints, say) counts only where
    there is no other. Where the task asks for a function, a block that defines it comes before one that does not (an
    example of its use).

    Raises:
        NoAnswer: the last block is not closed, or the program is empty or longer than MAX_PROGRAM.
    """
    blocks = _blocks(after_thinking(text)) or _bare(text)
    if not blocks:
        raise NoAnswer("no fenced Python block after the thinking")
    candidates = [block for block in blocks if block.is_program()] or blocks
    if fn_name is not None:
        candidates = [block for block in candidates if block.defines(fn_name)] or candidates
    source = "\n".join(candidates[-1].lines)
    if len(source) > MAX_PROGRAM:
        raise NoAnswer(f"a program of {len(source)} characters, more than {MAX_PROGRAM}")
    if not source.strip():
        raise NoAnswer("the program is empty")
    return textwrap.dedent(source.strip("\n")).rstrip() + "\n"


def continued_program(beginning: str, completion: str, ends: Sequence[str]) -> str:
    """The program that a completion goes on with, up to the first of ``ends``.

    Raises:
        NoAnswer: it is longer than MAX_PROGRAM.
    """
    found = [place for end in ends if (place := completion.find(end)) >= 0]
    program = beginning + completion[: min(found, default=len(completion))]
    if len(program) > MAX_PROGRAM:
        raise NoAnswer(f"a program of {len(program)} characters, more than {MAX_PROGRAM}")
    return program.rstrip() + "\n"


def _bare(text: str) -> list[Block]:
    """The program that ``<answer>`` holds without a fence, if it does."""
    try:
        block = Block("", False, single_answer(text).split("\n"))
    except NoAnswer:
        return []
    return [block] if block.is_program() else []


def _blocks(text: str) -> list[Block]:
    """The closed blocks that say Python or nothing, in order."""
    blocks: list[Block] = []
    block: Block | None = None
    counts = False
    for line in text.split("\n"):
        if block is None:
            if (opened := _opened_by(line)) is not None:
                block, counts = opened
        elif block.closed_by(line):
            blocks += [block] if counts else []
            block = None
        else:
            block.lines.append(line)
    if block is not None:
        if not (counts and block.is_python and block.close_behind_code()):
            raise NoAnswer("the last code block is not closed")
        blocks.append(block)
    return blocks


def _opened_by(line: str) -> tuple[Block, bool] | None:
    """The block that a line opens, and whether it may be Python."""
    line = line.strip()
    if line.startswith(ANSWER):
        line = line.removeprefix(ANSWER).lstrip()
    if line[:3] in ("```", "~~~"):
        found = FENCE.match(line)
    else:
        found = GLUED.fullmatch(line) if len(line) <= MAX_LINE and line.count("```") == 1 else None
    if found is None or (found["fence"][0] == "`" and "`" in found["info"]):
        return None
    info = found["info"].strip().lower()
    is_python = PYTHON.match(info) is not None
    return Block(found["fence"], is_python, []), is_python or not info
