"""How cost grows, drawn from the output of other benchmarks.

    python -m benchmarks.update --lengths 64 128 256 512 > docs/results/cost/time.txt
    python -m benchmarks.update --vocabularies 8 32 128 --lengths 1000 4000 16000 > docs/results/cost/memory.txt
    python -m benchmarks.rollout --groups 1 2 4 8 16 32 > docs/results/cost/groups.txt
    python -m benchmarks.plots docs/results/cost/*.txt --to docs/results/cost.png

Each file's last line is one JSON object. Its keys decide which picture is drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.report.drawing import LIGHT, STYLE


def time_against_tokens(ax: Any, found: dict[str, Any]) -> None:
    """Seconds of an update. The line's slope is the seconds of all sizes over their tokens."""
    rows = found["rows"].values()
    tokens, seconds = [r["packed_tokens"] for r in rows], [r["seconds"] for r in rows]
    slope = sum(seconds) / sum(tokens)
    ax.plot([0, max(tokens)], [0, slope * max(tokens)], color=LIGHT.muted, linewidth=1, label="linear")
    ax.plot(tokens, seconds, "o-", color=LIGHT.series[0], label="one update")
    ax.set(title="time against tokens", xlabel="tokens of a step", ylabel="seconds", ylim=(0, None))


def memory_against_vocabulary(ax: Any, found: dict[str, Any]) -> None:
    """Peak memory of head and loss. Dashed: the size of the logits alone."""
    for i, (vocabulary, by_tokens) in enumerate(found["rows"].items()):
        tokens, colour = [int(n) for n in by_tokens], LIGHT.series[i]
        ax.plot(tokens, by_tokens.values(), "o-", color=colour, label=f"vocabulary {vocabulary}")
        logits = [int(vocabulary.rstrip("k")) * 1000 * n * 4 / 2**20 for n in tokens]
        ax.plot(tokens, logits, "--", color=colour, linewidth=1)
    ax.set(
        title="memory of the head (dashed: its logits alone)", xlabel="tokens", ylabel="MB", yscale="log", xscale="log"
    )


def throughput_against_group(ax: Any, found: dict[str, Any]) -> None:
    """Sampled tokens a second by completions a prompt, for the same number of completions."""
    rows = found["tokens_per_s_by_group_size"]
    for i, way in enumerate(next(iter(rows.values()))):
        rates = [row[way] for row in rows.values()]
        ax.plot([int(G) for G in rows], rates, "o-", color=LIGHT.series[i], label=way)
    ax.set(title="throughput against G", xlabel="completions a prompt (G)", ylabel="tokens/s", ylim=(0, None))
    ax.set_xscale("log", base=2)


def panel_of(found: dict[str, Any]) -> Callable[[Any, dict[str, Any]], None]:
    if "tokens_per_s_by_group_size" in found:
        return throughput_against_group
    return memory_against_vocabulary if found["options"]["vocabularies"] else time_against_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    import matplotlib
    from matplotlib.figure import Figure

    results = [json.loads(file.read_text(encoding="utf-8").splitlines()[-1]) for file in options.files]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(results), 3.6), layout="constrained")
        for ax, found in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
            panel_of(found)(ax, found)
            ax.grid(color=LIGHT.grid)
            ax.legend()
        figure.savefig(options.to, dpi=110)


if __name__ == "__main__":
    main()
