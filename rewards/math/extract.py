r"""Where a math answer stands in a completion: one piece of text, or a reason why there is none.

Only text after the thinking counts. The first of these that occurs there decides, and if it is broken, nothing else is
tried: the single ``<answer>`` block; the last ``\boxed{}`` (or ``\fbox{}``); ``#### x`` on the last line; and, where
the task allows it, a plain number that ends the last line.

Boxes joined by a comma, "or" or "and" are one answer: a list, right only as a whole.
"""

from __future__ import annotations

import re

from rewards.math import beside
from rewards.math.markup import with_dollars
from rewards.math.words import changes_a_number
from rewards.tags import ANSWER, END_ANSWER, NoAnswer, after_thinking, single_answer

GOLD_MARK = "####"
BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ \t\n]*")
BRACE = re.compile(r"\\[^A-Za-z]|[{}]", re.DOTALL)  # an escaped brace is no brace
JOINT = re.compile(
    r"[\s$]*(?P<joint>(?:[,;]|\bor\b|\band\b|\\text\s*\{\s*,?\s*(?:or|and)\s*\}|\\(?:lor|land|vee|wedge|quad)\b|[\s$])+)"
    r"(?:\\?[A-Za-z]\w*(?:_\{\w+\})?\s*=)?[\s$]*"
)
IN_SENTENCES = frozenset(
    [
        "is",
        "are",
        "be",
        "to",
        "from",
        "by",
        "for",
        "so",
        "because",
        "since",
        "therefore",
        "thus",
        "hence",
        "equals",
        "equal",
    ]
)
PROSE = re.compile(r"[A-Za-z\s,.:;'*()-]{0,120}", re.ASCII)
PREFIX = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?answer(?:\s+is\b|\s*[:=])\s*:?\s*",
    re.IGNORECASE,
)
DOLLARS = re.compile(r"(?<!\\)\$+([^$]+)(?<!\\)\$+")
PLAIN_NUMBER = re.compile(
    r"(?P<before>.*?)(?<![\w.,/^-])(?P<number>[+-]?\\?\$?-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?%?)"
    r"(?P<unit>(?: [A-Za-z]+){0,2})",
    re.ASCII,
)
CHOICE_BEFORE = re.compile(r"(?:\bor|\band|\bnot|[,/])\s*$", re.IGNORECASE)


def find_piece(text: str, *, plain_number: bool = False) -> str:
    """The answer in ``text`` (prefill and completion), not empty, as the model wrote it.

    Raises:
        NoAnswer: there is none, or not exactly one.
    """
    part = after_thinking(text)
    if ANSWER in part or END_ANSWER in part:
        return _in_block(with_dollars(single_answer(text)))
    if BOX.search(part):
        part = with_dollars(part)
        piece, start, end = _joined_boxes(part)
        return piece + beside.whole(part, start, end)
    line = part.rstrip().rpartition("\n")[2].strip()
    if line.startswith(GOLD_MARK):
        return _filled(line[len(GOLD_MARK) :], f"nothing follows {GOLD_MARK}")
    if plain_number:
        return _final_number(line)
    raise NoAnswer("no answer block, no box")


def find_gold(answer: str) -> str:
    r"""The final answer in a row's ``answer``: what its last box holds, what follows its last ``####``, or all of it.

    Raises:
        NoAnswer: it is empty, or its last box is.
    """
    if BOX.search(answer):
        return _joined_boxes(with_dollars(answer))[0]
    return _filled(answer.rpartition(GOLD_MARK)[2], "the answer is empty")


def only_prose(text: str) -> bool:
    """Whether the text beside an answer is words that do not change it."""
    if not PROSE.fullmatch(text):
        return False
    return not any(changes_a_number(word) for word in re.findall(r"[a-z]+", text.lower()) if word not in IN_SENTENCES)


def _filled(piece: str, complaint: str) -> str:
    if not piece.strip():
        raise NoAnswer(complaint)
    return piece.strip(" \t\r\n")


def _in_block(block: str) -> str:
    """The piece of an answer block: its box, the one formula among its prose, or all of it."""
    if BOX.search(block):
        joined, start, end = _joined_boxes(block)
        return _alone(joined, block, start, end)
    formulas = list(DOLLARS.finditer(block))
    if len(formulas) == 1 and formulas[0][0] != block:
        before, after = block[: formulas[0].start()], block[formulas[0].end() :]
        if only_prose(before) and not after.strip(" .") and not before.endswith("-"):
            return _filled(formulas[0][1], "the formula is empty")
    prefix = PREFIX.match(block)
    return _filled(block[prefix.end() :] if prefix else block, "the answer is empty")


def _alone(piece: str, block: str, start: int, end: int) -> str:
    suffix = beside.whole(block, start, end)
    before, after = block[:start], block[end:]
    after = after.lstrip().removeprefix(suffix.strip()) if suffix else after
    before = re.sub(r"(?:\\?[A-Za-z]\w*\s*)?=[\s$]*$", "", before.rstrip(" $"))
    if not only_prose(before.replace("$", "")) or not only_prose(after.replace("$", "")):
        raise NoAnswer("something stands beside the box in the answer block")
    return piece + suffix


def _joined_boxes(text: str) -> tuple[str, int, int]:
    """The last box and those joined to it, as one piece, and where they start and end."""
    boxes = _boxes(text)
    start, content, end = boxes.pop()
    pieces = [content]
    stop = end
    while boxes:
        before_start, before, before_end = boxes.pop()
        joint = JOINT.fullmatch(text, before_end, start) if start - before_end <= 60 else None
        if not joint or not joint["joint"].strip(" \t\n$") or joint["joint"].strip(" \t\n$") == r"\quad":
            break
        start = before_start
        pieces.append(before)
    if len(pieces) > 1:
        for piece in pieces:
            _filled(piece, "a box is empty")
    pieces = list(dict.fromkeys(_innermost(piece) for piece in reversed(pieces)))
    return _filled(", ".join(pieces), "the box is empty"), start, stop


def _innermost(piece: str) -> str:
    """The piece without boxes around the whole of it."""
    piece = piece.strip()
    for _ in range(3):
        box = BOX.match(piece)
        if not box or piece[box.end() :][:1] != "{" or not piece.endswith("}") or len(BOX.findall(piece)) > 3:
            break
        piece = piece[box.end() + 1 : -1].strip()
    return piece


def _boxes(text: str) -> list[tuple[int, str, int]]:
    """Start, content and end of every outermost box, in order; the last must be closed. One pass over the text."""
    first = BOX.search(text)
    assert first is not None
    closing: dict[int, int] = {}
    stack: list[int] = []
    for brace in BRACE.finditer(text, first.start()):
        if brace[0] == "{":
            stack.append(brace.start())
        elif brace[0] == "}" and stack:
            closing[stack.pop()] = brace.start()
    boxes: list[tuple[int, str, int]] = []
    position, last_is_open = 0, False
    for box in BOX.finditer(text):
        if box.start() < position:
            continue  # inside of the box before
        opening = box.end()
        if opening in closing:
            position = closing[opening] + 1
            boxes.append((box.start(), text[opening + 1 : position - 1], position))
            last_is_open = False
        elif re.match(r"[0-9A-Za-z](?![0-9A-Za-z])", text[opening : opening + 2]):  # TeX's \boxed 5
            position = opening + 1
            boxes.append((box.start(), text[opening], position))
            last_is_open = False
        else:
            last_is_open = True
    if last_is_open or not boxes:
        raise NoAnswer("the last box is not closed")
    return boxes


def _final_number(line: str) -> str:
    """The number that ends the line, with its currency, percent sign or unit."""
    line = re.sub(r"\*\*|(?<!\\)\$(?=[^0-9]|$)|\\[()]", "", line).rstrip(" .")
    match = PLAIN_NUMBER.fullmatch(line) if len(line) <= 2000 else None
    if match is None or CHOICE_BEFORE.search(match["before"]) or not only_prose(match["unit"]):
        raise NoAnswer("no box, and the last line does not end in one number")
    return match["number"] + match["unit"]
