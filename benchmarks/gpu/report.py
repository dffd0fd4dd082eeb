"""The results that the parts of ``gpu_suite.sh`` left in a folder, as one JSON file and a table.

    python -m benchmarks.gpu.report WORK OUT

If a part's output does not end in JSON, its last lines are reported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = {
    "rollout": {
        "tokens_per_s": "rollout tokens/s",
        "decode_step_s": "s a decoding step",
        "plain_decode_step_s": "s without a graph",
        "step_over_floor": "times the weights' floor",
        "step_over_floor_with_cache": "times the floor with cache",
        "peak_gb": "rollout GB",
    },
    "update": {
        "update_s": "s an update",
        "mfu": "MFU",
        "mfu_prompts_repeated": "MFU, prompts repeated",
        "peak_gb": "update GB",
    },
    "trl": {
        "samples_per_s_ratio": "samples/s over TRL's",
        "peak_memory_ratio": "peak memory over TRL's",
    },
}


def result_of(part: Path) -> dict[str, Any]:
    """The last line of a part's output, or why there is none and its last lines."""
    lines = part.with_suffix(".out").read_text().splitlines() if part.with_suffix(".out").exists() else []
    failed = part.with_suffix(".failed")
    if lines and lines[-1].startswith("{"):  # a part that ran out of time may have printed what it had
        return json.loads(lines[-1]) | ({"unfinished": failed.read_text().strip()} if failed.exists() else {})
    said = part.with_suffix(".err").read_text()[-2000:] if part.with_suffix(".err").exists() else ""
    return {"error": failed.read_text().strip() if failed.exists() else "said nothing", "output": said}


def table(results: dict[str, Any]) -> str:
    shapes = list(dict.fromkeys(name.partition("_")[2] for name in results if "_" in name))
    lines = [f"{'':<28}" + "".join(f"{shape:>12}" for shape in shapes)]
    for part, columns in COLUMNS.items():
        for column, words in columns.items():
            cells = [_cell(results.get(f"{part}_{shape}", {}), column) for shape in shapes]
            lines.append(f"{words:<28}" + "".join(f"{cell:>12}" for cell in cells))
    machine = results.get("machine", {})
    if "bytes_per_s" in machine:
        peaks = f"{machine['bytes_per_s'] / 1e9:.0f} GB/s, {machine['flops_per_s'] / 1e12:.3g} TFLOP/s in bfloat16"
        hardware = machine["hardware"]
        lines.append(f"\nmeasured: {peaks}; {hardware.get('gpu', hardware['cpu'])}; {machine['versions']}")
    lines += [f"{name}: {row['error']}" for name, row in results.items() if "error" in row]
    return "\n".join(lines)


def _cell(row: dict[str, Any], column: str) -> str:
    if "error" in row:
        return "failed"
    value = row.get(column)
    return "" if value is None else f"{value:.4g}"


def main(work: str, out: str) -> None:
    names = {path.stem for path in Path(work).iterdir() if path.suffix in (".out", ".failed")}
    results = {name: result_of(Path(work) / name) for name in sorted(names)}
    (Path(out) / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (Path(out) / "gpu.txt").write_text(table(results) + "\n")
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
