"""What the parts of ``gpu_suite.sh`` found, as one JSON file and a table.

    python -m benchmarks.gpu.report FOLDER

FOLDER holds results.jsonl: lines of a part's name and what it found. gpu.json and gpu.txt are written beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RESULTS, LOGS, TABLE = "results.jsonl", "logs.txt", "gpu.txt"
SIZED = {
    "rollout": {
        "decode_tokens_per_s": "decoding, tokens/s",
        "decode_step_ms": "ms a decoding step",
        "masked_decode_step_ms": "ms with attention under masks",
        "plain_decode_step_ms": "ms without a graph",
        "floor_ms": "ms to read the weights once",
        "floor_with_cache_ms": "ms with keys and values",
        "step_over_floor": "step over the weights' floor",
        "step_over_floor_with_cache": "step over the floor with cache",
        "small_decode_step_ms": "ms a decoding step of few",
        "small_step_over_floor": "the same over the weights' floor",
        "prefill_tokens_per_s": "prefill, tokens/s",
        "prefill_mfu": "prefill, share of the peak",
        "rollout_tokens_per_s": "rollout, tokens/s",
        "rollout_tokens_per_s_spread": "the same, lengths spread",
        "peak_gb": "rollout GB",
        "start_s": "s until it could start",
    },
    "update": {
        "update_s": "s an update, best way",
        "mfu": "MFU, best way",
        "mfu_prompts_repeated": "MFU, prompts repeated",
        "packed_over_padded": "padded's time over packed's",
        "peak_gb": "update GB, best way",
        "expected_gb": "GB by the count",
        "start_s": "s until it could start",
    },
    "fsdp": {"step_s": "FSDP2: s a step", "logprob_difference": "FSDP2: nats off the sampler", "peak_gb": "FSDP2: GB"},
    "trl": {"samples_per_s_ratio": "samples/s over TRL's", "peak_memory_ratio": "peak memory over TRL's"},
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """What each part found. Its lines add up; later keys win."""
    found: dict[str, dict[str, Any]] = {}
    for line in (folder / RESULTS).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row.pop("part"), {}).update(row)
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    shapes = sorted({name.partition("_")[2] for name in results if name.partition("_")[0] in SIZED})
    lines = [f"{'':<32}" + "".join(f"{shape:>12}" for shape in shapes)]
    for part, columns in SIZED.items():
        if not any(f"{part}_{shape}" in results for shape in shapes):
            continue
        for column, words in columns.items():
            cells = [_cell(results.get(f"{part}_{shape}", {}).get(column)) for shape in shapes]
            lines.append(f"{words:<32}" + "".join(f"{cell:>12}" for cell in cells))
    for shape in shapes:
        for name, way in results.get(f"update_{shape}", {}).get("ways", {}).items():
            cells = ", ".join(f"{key} {_cell(value)}" for key, value in way.items() if value is not None)
            lines.append(f"update {shape}, {name}: {cells}")
    for name, row in results.items():
        if name.startswith("learn") and "accuracy" in row:
            course = " -> ".join(f"{a:.3f} [{low:.3f}, {high:.3f}]" for a, low, high in row["accuracy"])
            lines.append(f"{name}: accuracy {course} in {row['steps']} steps, {row['step_s']:.3g} s each")
    machine = results.get("machine", {})
    if "bytes_per_s" in machine:
        peaks = f"{machine['bytes_per_s'] / 1e9:.0f} GB/s, {machine['flops_per_s'] / 1e12:.3g} TFLOP/s in bfloat16"
        lines.append(f"measured: {peaks}, {machine['host_bytes_per_s'] / 1e9:.3g} GB/s from the host")
    if "hardware" in machine:
        hardware = machine["hardware"]
        lines.append(f"{hardware.get('gpu', hardware['cpu'])}; {machine['versions']}")
    spent = [f"{name} {row['seconds']}/{row['limit']}" for name, row in results.items() if "seconds" in row]
    lines.append(f"seconds: {', '.join(spent)}")
    for word in ("left_out", "error"):
        lines += [f"{name}: {row[word]}" for name, row in results.items() if word in row]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def write(folder: Path) -> None:
    results = read(folder)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / TABLE).write_text(table(results) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print((Path(sys.argv[1]) / TABLE).read_text())
