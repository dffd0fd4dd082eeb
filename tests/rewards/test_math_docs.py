"""The table of docs/rewards.md: what it says is accepted is accepted, and what it says is not, is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rewards.math import gold_fault, verify

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


def lines() -> list[tuple[str, str, list[str], list[str]]]:
    """What, the row's answer, the right answers, the wrong ones: of each line of the table."""
    section = DOCS.read_text("utf-8").partition("### What is accepted as equal")[2].partition("\n## ")[0]
    found = []
    for line in section.splitlines():
        if not line.startswith("| ") or line.startswith(("| what ", "|---")):
            continue
        what, *cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        spans = [[span.replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", cell)] for cell in cells]
        found.append((what, spans[0][0], spans[1], spans[2]))
    return found


LINES = lines()


def test_the_table_is_read_whole() -> None:
    assert len(LINES) >= 40
    assert all(right and wrong for _, _, right, wrong in LINES)
    assert sum(what.startswith("ambiguous") for what, *_ in LINES) >= 6


@pytest.mark.parametrize(("what", "gold", "right", "wrong"), LINES, ids=[line[0] for line in LINES])
def test_a_line_of_the_table(what: str, gold: str, right: list[str], wrong: list[str]) -> None:
    assert gold_fault(gold) is None
    for answers, reward in ((right, 1.0), (wrong, 0.0)):
        for answer in answers:
            completion = answer if "boxed" in answer else f"The answer is \\boxed{{{answer}}}."
            verdict = verify(gold, completion, timeout=20.0)
            assert verdict.reward == reward, f"{what}: {answer}: {verdict}"
