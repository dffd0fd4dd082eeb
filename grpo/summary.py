"""What a run achieved, in one line: held-out accuracy and completion length, before and after.

``python -m grpo.summary RUN`` writes ``RUN/summary.json`` and prints the line. Reads the run folder only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from grpo.errors import UserError


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every line of ``RUN/metrics.jsonl``. Raises UserError that names the line that is no JSON object."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{file}: no such file; give the folder of a run, such as runs/demo")
    lines = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not JSON ({error}); the run was cut off: go on with --resume") from error
        lines.append(line)
    return lines


def summarize(lines: list[dict[str, Any]]) -> dict[str, float]:
    """First and last evaluation: accuracy (share of held-out tasks solved) and mean completion length (tokens).

    ``seconds`` is the time spent in training steps; evaluation is not counted, as in ``training.max_seconds``.
    """
    evaluations = sorted((line for line in lines if "eval/accuracy" in line), key=lambda line: line["step"])
    if len({line["step"] for line in evaluations}) < 2:
        raise UserError("a summary needs an evaluation before and one after training: set data.eval_size above 0")
    first, last = evaluations[0], evaluations[-1]
    return {
        "accuracy_before": first["eval/accuracy"],
        "accuracy_after": last["eval/accuracy"],
        "length_before": first["eval/completions/mean_length"],
        "length_after": last["eval/completions/mean_length"],
        "seconds": sum(line.get("step_time", 0.0) for line in lines),
    }


def write_summary(run: Path) -> str:
    """Write ``RUN/summary.json``; returns the line for people."""
    summary = summarize(read_metrics(run))
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return (
        f"{run.resolve().name}: held-out accuracy {summary['accuracy_before']:.3f} -> {summary['accuracy_after']:.3f}, "
        f"mean completion length {summary['length_before']:.1f} -> {summary['length_after']:.1f} tokens, "
        f"{summary['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m grpo.summary", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    arguments = parser.parse_args()
    try:
        print(write_summary(arguments.run))
    except UserError as error:
        sys.exit(f"{arguments.run}: {error}")


if __name__ == "__main__":
    main()
