"""What a run achieved, in one line: held-out accuracy and completion length before and after.

``python -m grpo.report.summary RUN`` writes ``RUN/summary.json`` and prints the line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from grpo.errors import UserError, printable
from grpo.files import write_whole
from grpo.run.read import headline, read_run

FACTS = ("accuracy_before", "accuracy_after", "length_before", "length_after", "seconds")


def write_summary(folder: Path) -> str:
    """Write ``summary.json`` into the run folder; returns the line for people.

    Accuracy is the share of held-out tasks solved, length in tokens, both at the first and the last evaluation;
    ``seconds`` were spent in training steps, evaluation is not counted. Raises UserError where the run was not
    evaluated before and after training.
    """
    run = read_run(folder)
    facts = headline(run)
    if len(run.series("eval/accuracy")[0]) < 2:
        raise UserError(f"{folder} was not evaluated before and after training: it needs data.eval_size above 0")
    summary = {name: round(float(facts[name]), 6) for name in FACTS}
    write_whole(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return (
        f"{folder.resolve().name}: held-out accuracy "
        f"{summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}, "
        f"mean completion length {summary['length_before']:.1f} -> {summary['length_after']:.1f} tokens, "
        f"{summary['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo.report.summary", description="Sum up a run in one line.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    try:
        print(printable(write_summary(parser.parse_args().run)))
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
