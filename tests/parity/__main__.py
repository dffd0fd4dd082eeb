"""``make parity``: every loss beside TRL's own code or, where TRL has none, beside plain loops written from the paper.

Prints the table, writes it into docs/algorithms.md between its markers, and exits with 1 where a line fails.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

from tests.parity.cases import cases
from tests.parity.compare import MICRO_BATCHES, SEEDS, TOLERANCE, Line, adaptive_entropy, beside_reference, beside_trl

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"
BEGIN, END = "<!-- parity: begin (written by make parity) -->", "<!-- parity: end -->"


def lines() -> list[Line]:
    return [beside_reference(case) if case.trl is None else beside_trl(case) for case in cases()] + [adaptive_entropy()]


def table(found: list[Line]) -> str:
    head = f"| loss | beside | loss | gradient | in {MICRO_BATCHES} micro-batches | |"
    rows = [
        f"| {line.name} | {line.beside} | {_bound(line.loss)} | {_bound(line.gradient)} | {_bound(line.split)} | "
        f"{'yes' if line.passes else 'NO ' + line.remark} |"
        for line in found
    ]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _bound(difference: float) -> str:
    """Its order of magnitude: the last digits of a rounding error differ between machines."""
    return "0" if difference == 0 else next(f"< 1e{e}" for e in range(-16, 99) if difference < 10.0**e)


def write(found: list[Line]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        sys.exit(f"{PAGE} has no lines {BEGIN} and {END}, between which the table goes")
    PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    found = lines()
    print(table(found))
    write(found)
    wrong = [line for line in found if not line.passes]
    print(
        f"\n{len(found) - len(wrong)} of {len(found)} agree within {TOLERANCE:g} in float64, {len(SEEDS)} seeds each "
        f"(TRL {metadata.version('trl')}, torch {metadata.version('torch')}); written to {PAGE.name}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
