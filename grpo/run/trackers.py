"""wandb, TensorBoard and trackio behind one rule: nothing a tracker does may disturb training.

If the recipe asks for a tracker that is not installed, that is an error before the model loads. Any later failure (no
network, a full quota, a crash in the tracker) costs one warning and that tracker.
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grpo.errors import UserError
from grpo.run.secrets import command_without_secrets

if TYPE_CHECKING:
    from grpo.config import TrackingConfig

log = logging.getLogger("grpo")

SECONDS_TO_INIT = 30
INSTALL = {
    "wandb": "pip install 'grpo-train[wandb]'",
    "tensorboard": "pip install 'grpo-train[tensorboard]'",
    "trackio": "pip install trackio",
}


def _storable(name: str) -> str:
    """A reward may log a metric by any name; half of a surrogate pair has no bytes to be stored as."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class _Sink:
    """One tracker: what to call for a line of metrics, and at the end."""

    name: str
    log: Callable[[int, Mapping[str, float]], object]
    close: Callable[[], object]


class Trackers:
    """The trackers of a run that still work."""

    def __init__(self, sinks: list[_Sink]) -> None:
        self._sinks = sinks

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        named = {_storable(name): value for name, value in metrics.items()}
        self._sinks = [s for s in self._sinks if _survives(s.name, lambda s=s: s.log(step, named))]  # type: ignore[misc]

    def close(self) -> None:
        for sink in self._sinks:
            _survives(sink.name, sink.close)
        self._sinks = []


def check_installed(tracking: TrackingConfig) -> None:
    """Raise UserError, with the commands to run, where trackers that the recipe asks for are not installed."""
    if missing := [name for name in _asked_for(tracking) if find_spec(name) is None]:
        cures = "; ".join(f"tracking.{name}: not installed here, run: {INSTALL[name]}" for name in missing)
        raise UserError(f"{cures} (or switch it off in the recipe)")


def open_trackers(folder: Path, tracking: TrackingConfig, recipe_dict: dict[str, Any], *, first_step: int) -> Trackers:
    """Start the trackers that the recipe asks for; ``first_step`` is the first one they will be told of."""
    check_installed(tracking)
    opened: list[_Sink] = []
    for name in _asked_for(tracking):
        # their code is loaded here, not at the top: it is optional and slow
        with _no_secrets_in_command():
            _survives(name, lambda name=name: opened.append(_OPEN[name](folder, tracking, recipe_dict, first_step)))  # type: ignore[misc]
    return Trackers(opened)


@contextmanager
def _no_secrets_in_command() -> Iterator[None]:
    """wandb writes the command line down."""
    whole = sys.argv
    sys.argv = [whole[0], *command_without_secrets(whole[1:])]
    try:
        yield
    finally:
        sys.argv = whole


def _asked_for(tracking: TrackingConfig) -> list[str]:
    switches = {"wandb": tracking.wandb != "off", "tensorboard": tracking.tensorboard, "trackio": tracking.trackio}
    return [name for name, on in switches.items() if on]


def _survives(name: str, call: Callable[[], object]) -> bool:
    """Whether ``call`` worked. Catches everything: whatever a tracker raises, training is worth more."""
    try:
        call()
    except Exception as error:
        log.warning(
            "%s failed and is switched off for this run; metrics.jsonl has everything (%s: %s)",
            name,
            type(error).__name__,
            str(error).strip().partition("\n")[0],
        )
        return False
    return True


def _run_name(folder: Path, tracking: TrackingConfig) -> str:
    return tracking.run_name or folder.resolve().name


def _open_wandb(folder: Path, tracking: TrackingConfig, recipe_dict: dict[str, Any], first_step: int) -> _Sink:
    import wandb

    identifier = folder / "wandb" / "run_id.txt"  # a resumed run goes on in the same wandb run
    known = identifier.read_text().strip() if identifier.exists() else secrets.token_hex(4)
    identifier.parent.mkdir(parents=True, exist_ok=True)
    identifier.write_text(known)

    def start(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=tracking.project,
            name=_run_name(folder, tracking),
            id=known,
            resume="allow",
            dir=str(folder),
            config=recipe_dict,
            mode=mode,
            # never wait long for a server, ask for a key on the terminal briefly, leave the screen to our own progress
            settings=wandb.Settings(
                init_timeout=SECONDS_TO_INIT, login_timeout=30, finish_timeout=60, console="off", silent=True
            ),
        )

    try:
        run = start("offline" if tracking.wandb == "offline" else "online")
    except Exception as error:  # as in _survives
        if tracking.wandb == "offline":
            raise
        reason = str(error).strip().partition("\n")[0]
        with suppress(Exception):  # its service knows the run that did not start, and refuses another of that name
            wandb.teardown()
        run = start("offline")
        log.warning("wandb cannot go online (%s); writing offline, `wandb sync %s/wandb/*` uploads it", reason, folder)
    if run.url:
        log.info("wandb: %s", run.url)
    return _Sink("wandb", lambda step, metrics: run.log(dict(metrics), step=step), run.finish)


def _open_tensorboard(folder: Path, tracking: TrackingConfig, recipe_dict: dict[str, Any], first_step: int) -> _Sink:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an earlier start logged beyond the checkpoint
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Sink("tensorboard", write, writer.close)


def _open_trackio(folder: Path, tracking: TrackingConfig, recipe_dict: dict[str, Any], first_step: int) -> _Sink:
    import trackio

    name = _run_name(folder, tracking)
    trackio.init(project=tracking.project, name=name, config=recipe_dict, resume="allow")
    return _Sink("trackio", lambda step, metrics: trackio.log(dict(metrics), step=step), trackio.finish)


_OPEN: dict[str, Callable[[Path, TrackingConfig, dict[str, Any], int], _Sink]] = {
    "wandb": _open_wandb,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
}
