"""Every architecture of the installed transformers that can be made small: what ``rollout.backend: hf`` and the update
make of it. Writes docs/models.md.

    python -m benchmarks.families                # all of them, about five minutes on one core; goes on where it stopped
    python -m benchmarks.families llama gemma2   # these alone, printed, nothing written
"""

from __future__ import annotations

import argparse
import json
import signal
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.families.architectures import CASES, Case
from benchmarks.families.measure import Found, measure
from benchmarks.families.page import page

LIMIT = 120  # seconds for one training of one architecture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="transformers' names of architectures; all if none is given")
    parser.add_argument("--results", type=Path, default=Path(f"runs/families-{transformers.__version__}.jsonl"))
    parser.add_argument("--page", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--again", action="store_true", help="forget the results so far")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if unknown := set(arguments.kinds) - {case.kind for case in CASES}:
        parser.error(f"no case of {', '.join(sorted(unknown))}: benchmarks/families/architectures.py lists them")
    if arguments.kinds:
        for case in (case for case in CASES if case.kind in arguments.kinds):
            for lora in (False, True):
                print(case.kind, case.note, "LoRA" if lora else "full", _limited(case, lora), flush=True)
        return
    if arguments.again:
        arguments.results.unlink(missing_ok=True)
    done = _measure_all(arguments.results)
    arguments.page.write_text(page([(case, [done[_key(case, lora)] for lora in (False, True)]) for case in CASES]))


def _measure_all(results: Path) -> dict[str, Found]:
    """Results of earlier calls, and what they lack. Each is written as soon as it is there."""
    done: dict[str, Found] = {}
    if results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        done = {row.pop("key"): Found(**row) for row in rows}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as file:
        for case in CASES:
            for lora in (False, True):
                key = _key(case, lora)
                if key not in done:
                    done[key] = _limited(case, lora)
                    file.write(json.dumps({"key": key} | asdict(done[key])) + "\n")
                    file.flush()
                    print(key, done[key].status, done[key].why[:200], flush=True)
    return done


def _key(case: Case, lora: bool) -> str:
    """The settings are part of it, so that a case that was changed is measured again."""
    settings = zlib.crc32(repr(sorted(case.settings.items())).encode())
    return f"{case.kind} {case.note} {'LoRA' if lora else 'full'} {settings:x}"


class OutOfTime(BaseException):
    """Not an Exception, which checks at start would take for the model's."""


def _limited(case: Case, lora: bool) -> Found:
    try:
        with _time_limit(LIMIT):
            return measure(case, lora=lora)
    except OutOfTime as error:
        return Found("failed", str(error))


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def over(*_: Any) -> None:
        raise OutOfTime(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
