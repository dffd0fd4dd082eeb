"""Tables of docs/rewards.md, so that each of their lines is a test."""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"


def table_of(title: str, columns: int) -> list[tuple[str, ...]]:
    """The rows of the table whose first heading begins with ``title``; cells without their code marks."""
    lines = iter(DOCS.read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(f"| {title}"))
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip().strip("`").strip(" ") for cell in line.strip().strip("|").split(" | ")]
        assert len(cells) == columns, line
        rows.append(tuple(cells))
    assert len(rows) > 3, title
    return rows
