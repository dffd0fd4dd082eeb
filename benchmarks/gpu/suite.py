"""The parts of ``gpu_suite.sh``: one process each, one after another, each within its own limit.

    python -m benchmarks.gpu.suite --out FOLDER [--device cpu] [--shapes 0.5b 3b] [--parts NAME ...] [--smollm2 MODEL]

Every line of JSON that a part prints is appended to results.jsonl at once, so that a part or a suite that is killed
loses nothing. Several lines of a part add up: later keys win. After each part gpu.json and gpu.txt are written anew,
and the part's last lines of log are added to logs.txt. A part that fails is reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu import report

NEEDED = ("torch", "transformers", "accelerate", "pydantic", "yaml", "typer", "rich", "numpy", "safetensors")
SHAPES = ("0.5b", "1.5b", "3b")
SECONDS_IN_ALL = 540
CPU_PATIENCE = 3  # times the limits, where a part is only tried out and other jobs may want the cores
ANY = {"rollout": 60, "update": 60}  # limits of a shape that is not listed
LIMITS = {
    "0.5b": {"rollout": 35, "update": 45},
    "1.5b": {"rollout": 40, "update": 45},
    "3b": {"rollout": 55, "update": 60},
}
LEAST_SECONDS = 5  # a part that has fewer left is not begun
LOG_CHARACTERS = 3000  # of each part
CPU_SIZES = {  # for a trial on a CPU: what they measure means nothing
    "rollout": ["--prompts=2", "--completions=2", "--prompt-length=8", "--length=16", "--rounds=1"],
    "update": ["--prompts=2", "--completions=2", "--prompt-length=8", "--length=16", "--rounds=1"],
    "fsdp": ["--prompts=2", "--completions=2", "--prompt-length=8", "--length=16"],
}


@dataclass(frozen=True)
class Part:
    """A module of ``benchmarks.gpu``, with its arguments and the seconds that it may take."""

    name: str
    limit: int
    module: str
    arguments: list[str] = field(default_factory=list)
    launcher: list[str] = field(default_factory=list)  # before the module, where processes are to be launched

    def command(self) -> list[str]:
        return [sys.executable, *(self.launcher or ["-m"]), f"benchmarks.gpu.{self.module}", *self.arguments]


def all_parts(shapes: tuple[str, ...], device: str, smollm2: str | None) -> list[Part]:
    """What there is to run, the most telling first; the limits of the three shapes add up to ``SECONDS_IN_ALL``."""
    on, first = [f"--device={device}"], shapes[0]

    def of(module: str, shape: str, limit: int) -> Part:
        small = CPU_SIZES[module] if device == "cpu" else []
        return Part(f"{module}_{shape}", limit, module, [shape, *on, *small])

    sized = [[of(name, shape, LIMITS.get(shape, ANY)[name]) for name in ANY] for shape in shapes]
    by_telling = [sized[0], *reversed(sized[1:])]
    processes = 1 if device == "cuda" else 2  # gloo shards over two or more
    launcher = f"-m accelerate.commands.launch --config_file=launch/fsdp2.yaml --num_processes={processes} -m".split()
    fsdp = of("fsdp", first, 40)
    return [
        Part("machine", 20, "machine", on),
        Part("learn_tiny", 55, "learn", ["tiny", *on]),
        *by_telling[0],
        Part(fsdp.name, fsdp.limit, fsdp.module, fsdp.arguments, launcher),
        *(by_telling[1] if len(by_telling) > 1 else []),
        Part("learn_smollm2", 80, "learn", ["smollm2", *on, *([f"--model={smollm2}"] if smollm2 else [])]),
        *(part for parts in by_telling[2:] for part in parts),
        Part(f"trl_{first}", 65, "trl", [first, *on]),
    ]


class Suite:
    """Runs parts and keeps what they said in ``out``."""

    def __init__(self, out: Path, seconds: float, patience: float = 1):
        self.out, self.patience, self.deadline = out, patience, time.monotonic() + seconds * patience
        out.mkdir(parents=True, exist_ok=True)
        for name in (report.RESULTS, report.LOGS):
            (out / name).write_text("")

    def run(self, part: Part) -> int | str:
        """The part's exit status, or why it has none."""
        limit = min(part.limit * self.patience, self.deadline - time.monotonic())
        if limit < LEAST_SECONDS:
            self.note(part.name, {"error": "no time left"})
            return "no time left"
        begun = time.monotonic()
        process = subprocess.Popen(
            part.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        said: list[str] = []

        def take(line: str) -> None:
            self._result(part.name, line, said)

        readers = [
            threading.Thread(target=_read, args=(process.stdout, take)),
            threading.Thread(target=_read, args=(process.stderr, said.append)),
        ]
        for reader in readers:
            reader.start()
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"took over {limit:.0f} s"
        finally:  # what it started must not outlive it: it would hold the device
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for reader in readers:
            reader.join(timeout=5)
        seconds = round(time.monotonic() - begun, 1)
        if status != 0:
            self.note(part.name, {"error": f"ended with {status}" if isinstance(status, int) else status})
        self.note(part.name, {"status": status, "seconds": seconds, "limit": part.limit})
        with (self.out / report.LOGS).open("a") as logs:
            logs.write(f"--- {part.name}: status {status}, {seconds} s\n{''.join(said)[-LOG_CHARACTERS:]}\n")
        return status

    def note(self, part: str, found: dict[str, Any]) -> None:
        with (self.out / report.RESULTS).open("a") as results:
            results.write(json.dumps({"part": part, **found}) + "\n")

    def _result(self, part: str, line: str, said: list[str]) -> None:
        if line.startswith("{"):
            self.note(part, json.loads(line))
        else:
            said.append(line)


def _read(stream: IO[str] | None, take: Callable[[str], Any]) -> None:
    for line in stream or ():
        take(line)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", help="only these, by their names or the first words of them")
    parser.add_argument("--smollm2", help="a folder of SmolLM2-135M-Instruct's weights")
    parser.add_argument("--seconds", type=float, default=SECONDS_IN_ALL, help="for all parts together")
    options = parser.parse_args(arguments)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"gpu_suite: not installed: {', '.join(missing)}; put their wheels into $WHEELS", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the finally that ends the part
    suite, failed = Suite(options.out, options.seconds, CPU_PATIENCE if options.device == "cpu" else 1), 0
    for part in all_parts(tuple(options.shapes), options.device, options.smollm2):
        if options.parts and not any(part.name.startswith(name) for name in options.parts):
            continue
        begun = time.monotonic()
        status = suite.run(part)
        failed += status != 0
        report.write(options.out)
        print(f"{part.name}: {time.monotonic() - begun:.1f} of {part.limit} s, status {status}", file=sys.stderr)
    print((options.out / report.TABLE).read_text())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
