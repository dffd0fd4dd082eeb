"""Where a run's numbers go: ``metrics.jsonl`` and ``rollouts/`` always, trackers where asked, progress on the screen.

The files are the record: a disk that refuses them stops the run. Trackers are a convenience: one that is unreachable
or crashes is dropped with a warning, and training goes on. They are in ``trackers.py``, the screen in ``screen.py``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil

from grpo.errors import RunError
from grpo.files import write_whole
from grpo.health.bands import Bands
from grpo.health.best import Best
from grpo.health.history import ROLLED_BACK, rolled_back_to
from grpo.health.watch import Demand, Watch
from grpo.run.fields import COST
from grpo.run.read import read_jsonl
from grpo.run.screen import Tell, open_display
from grpo.run.trackers import open_trackers

if TYPE_CHECKING:
    from grpo.config import TrackingConfig

log = logging.getLogger("grpo")


class RunLog:
    """Logs one run. Rank 0 alone constructs it; use it as a context manager or call ``close``.

    ``resume_offset`` is the ``offset`` in the checkpoint that the run goes on from. ``metrics.jsonl`` is cut there,
    because the lines beyond will be written again. ``recipe_dict`` is the resolved recipe, for the trackers.
    Raises UserError for a tracker that is asked for but not installed, and for a ``metrics.jsonl`` that no run wrote.
    """

    def __init__(
        self,
        folder: Path,
        tracking: TrackingConfig,
        *,
        recipe_dict: dict[str, Any],
        total_steps: int,
        resume_offset: int | None = None,
    ) -> None:
        self.folder = folder
        training = recipe_dict.get("training", {})
        self._price = training.get("dollars_per_hour")
        self._paid = _paid(folder / "metrics.jsonl") if self._price is not None and resume_offset is not None else 0.0
        self._file = _open_at(folder / "metrics.jsonl", resume_offset)
        step, seconds = _so_far(folder / "metrics.jsonl")
        if resume_offset is not None:
            _forget_rollouts(folder / "rollouts", after=step)
        self._watch = Watch(recipe_dict.get("health"))
        self._bands = Bands(recipe_dict.get("expect") or [])
        self.best = Best(recipe_dict.get("training", {}).get("save_best"))
        for row in read_jsonl(folder / "metrics.jsonl"):
            self._watch.see(row)
            self._bands.see(row)
            self.best.see(row)
        self._trackers = open_trackers(folder, tracking, recipe_dict, first_step=step + 1)
        self._display = open_display(
            total_steps, step, max_seconds=training.get("max_seconds"), seconds=seconds, price=self._price
        )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line to ``metrics.jsonl`` and tell the trackers and the screen.

        Floats are written in full (they read back to the same bits); NaN, infinity and None become null, which every
        JSON reader accepts. Evaluation metrics (``eval/…``) come in a call of their own. A rule of
        health that holds adds ``health/RULE``, and says so where it begins and ends. A recipe with a price
        adds what the machine has cost since the command began, and before a resume.
        """
        plain = {name: _number(value) for name, value in metrics.items() if name != "step"}
        if self._price is not None:
            plain[COST] = self._paid + self._price * (time.time() - psutil.Process().create_time()) / 3600
        row = {"step": step, **plain}
        changes, judgements = self._watch.see(row), self._bands.see(row)
        self.best.see(row)
        plain |= self._watch.metrics()
        try:
            self._file.write(json.dumps({"step": step, **plain}, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RunError(f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror or error}") from error
        self._trackers.log(step, {name: value for name, value in plain.items() if value is not None})
        if rolled_back_to(row) is None:
            self._display.log(step, plain)
        for change in changes:
            log.log(logging.INFO if change.statement is None else logging.WARNING, "step %d: %s", step, change.text())

        for judgement in judgements:
            log.log(logging.INFO if judgement.on_track else logging.WARNING, judgement.text())

    def phase(self, text: str, total: int | None = None) -> contextlib.AbstractContextManager[Tell]:
        """Show what the run is doing between two steps. It yields a function to call with how many of ``total`` are
        done."""
        return self._display.phase(text, total)

    def demand(self) -> Demand | None:
        """What the recipe wants done where a rule of health holds."""
        return self._watch.demand()

    def roll_back(self, step: int, rule: str, most: int) -> None:
        """Record that the run went back to its best model after ``step``, because a rule of health held."""
        best, count = self.best, self.best.rollbacks + 1
        log.warning(
            "step %d: back to the best model (step %d, %s %.4f), rollback %d of %d: health.%s. Steps and data go on",
            *(step, best.step, best.metric, best.value, count, most, rule),
        )
        self.log(step, {ROLLED_BACK: float(best.step), "rollback/count": float(count), f"rollback/{rule}": 1.0})

    def log_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]], prefix: str = "step") -> Path:
        """Write ``rollouts/{prefix}_{step:06d}.jsonl``, one row a line, whole or not at all. Returns its path."""
        path = self.folder / "rollouts" / f"{prefix}_{step:06d}.jsonl"
        lines = [json.dumps(_finite(row), ensure_ascii=False, default=str) + "\n" for row in rows]
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, "".join(lines))  # a lone surrogate is written as its escape, which JSON reads back
        except OSError as error:
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    @property
    def size(self) -> int:
        """Bytes of ``metrics.jsonl`` so far, on the disk or not."""
        return self._file.tell()

    @property
    def offset(self) -> int:
        """Bytes of ``metrics.jsonl`` that are safely on the disk: what a checkpoint stores as ``resume_offset``."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._display.close()
        self._trackers.close()
        with contextlib.suppress(OSError):  # log() has reported what could not be written
            self._file.close()


def _open_at(path: Path, offset: int | None) -> BinaryIO:
    """Open for appending, cut to ``offset`` bytes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        size = file.tell()
        if offset is not None and size < offset:
            log.warning("%s has %d bytes, its checkpoint saw %d: some metrics are lost", path, size, offset)
        elif offset is not None:
            file.truncate(offset)
            file.seek(offset)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return file


def _so_far(path: Path) -> tuple[int, float]:
    """Last step, and seconds spent in steps, that earlier starts of this run logged; (0, 0.0) for a new run. Raises
    UserError where a line is none that a run writes."""
    rows = list(read_jsonl(path))
    seconds = [time for row in rows if isinstance(time := row.get("step_time"), int | float)]
    return max((row["step"] for row in rows), default=0), float(sum(seconds))


def _paid(path: Path) -> float:
    """US dollars by wall-clock time that earlier starts logged, those of steps that are repeated included."""
    return max((row.get(COST) or 0.0 for row in read_jsonl(path)), default=0.0) if path.exists() else 0.0


def _forget_rollouts(folder: Path, after: int) -> None:
    """Remove rollouts of the steps that a resumed run will repeat: a report would mix the old with the new."""
    for file in folder.glob("*_*.jsonl"):
        number = file.stem.rpartition("_")[2]
        if number.isdigit() and int(number) > after:
            file.unlink()


def _number(value: Any) -> float | int | None:
    """A plain finite number, or None. Tensors and numpy scalars of one element are taken by ``item()``."""
    if hasattr(value, "item"):
        value = value.item()
    return None if value is None or not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    """``value`` with non-finite floats as None, inside lists and dictionaries too."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
