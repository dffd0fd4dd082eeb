"""The table of docs/evaluation.md: ``python -m grpo.config.suites_table``. A test holds them equal."""

from __future__ import annotations

from grpo.config.suites import Suite, suites

HEAD = "| suite | rows | at the hub | asked | judged by | samples | temperature, top-p | tokens |"


def table() -> str:
    """A line a suite."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(_line(name, suite) for name, suite in suites().items())]) + "\n"


def _line(name: str, suite: Suite) -> str:
    rows, sampling = suite.rows, suite.sampling
    place = "/".join(part for part in (rows.name, rows.file or rows.split) if part)
    asked = "begun answer" if suite.answer_begins else "question"
    how = "greedy" if sampling.temperature == 0 else f"{sampling.temperature:g}, {sampling.top_p:g}"
    args = "".join(f", {key}: {value}" for key, value in suite.reward.args.items())
    return (
        f"| `{name}` | {suite.title}: {rows.count} | `{rows.hub}` {place} @ `{(rows.revision or '')[:8]}` | {asked} | "
        f"`{suite.reward.name}`{args} | {sampling.num_generations} | {how} | {sampling.max_completion_length:,} |"
    )


if __name__ == "__main__":
    print(table(), end="")
