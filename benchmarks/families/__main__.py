"""Every architecture of the installed transformers that can be made small: what ``rollout.backend: hf`` and the update
make of it. Writes docs/models.md.

    python -m benchmarks.families                # all of them, about five minutes on one core; goes on where it stopped
    python -m benchmarks.families llama gemma2   # these alone, printed, nothing written
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import warnings
import zlib
from dataclasses import asdict
from pathlib import Path

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


def _limited(case: Case, lora: bool) -> Found:
    """``measure`` in a process of its own, which may hang or crash."""
    context = multiprocessing.get_context("fork")  # which has everything imported already
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(measure(case, lora=lora)))
    process.start()
    theirs.close()
    try:
        if not mine.poll(LIMIT):
            return Found("failed", f"it took more than {LIMIT} s")
        return mine.recv()
    except EOFError:
        process.join()
        return Found("failed", f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


if __name__ == "__main__":
    main()
