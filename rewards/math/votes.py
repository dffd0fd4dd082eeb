"""Which completions give the same answer: what a majority vote counts."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.math.extract import find_piece
from rewards.math.reward import same_answer
from rewards.math.text import as_written, canonical
from rewards.math.text_errors import Unreadable
from rewards.tags import NoAnswer


def votes(
    completions: Sequence[str],
    prefill: Sequence[str],
    status: Sequence[str],
    plain_number: bool = False,
    timeout: float = 3.0,
) -> list[int | None]:
    """A number for each completion, the same for answers that the verifier finds equal; None for one without an answer:
    none was given, it can't be read, or the completion was cut off.

    An answer is compared with the first one of each class, in the order of the completions.
    """
    classes: dict[str, int] = {}  # by text
    firsts: list[str] = []
    found: list[int | None] = []
    for text, before, how in zip(completions, prefill, status, strict=True):
        try:
            piece = find_piece(before + text, plain_number=plain_number) if how == "stop" else ""
            written = as_written(canonical(piece)) if piece else ""
        except (NoAnswer, Unreadable):
            written = ""
        if not written:
            found.append(None)
            continue
        if written not in classes:
            same = (n for n, first in enumerate(firsts) if same_answer(first, piece, timeout))
            classes[written] = next(same, len(firsts))
            firsts += [piece] * (classes[written] == len(firsts))
        found.append(classes[written])
    return found
