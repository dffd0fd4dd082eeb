"""The report of a run that is going on: rewritten while the steps go on, by a process of its own.

Drawing takes seconds, and matplotlib is slow to load. So neither is done in the training process: a process of the
lowest priority draws, now and then, and it takes at most SHARE of the time.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

from grpo.errors import printable
from grpo.report.write import no_longer_running

log = logging.getLogger("grpo")

FIRST = 30.0  # seconds of steps before the first drawing: a short run needs none
SHARE = 0.02
# It sees the modules that this process sees, whatever lies in the folder it is started in.
DRAW = (
    "import json, os, pathlib, sys; os.nice(19); sys.path[:] = json.loads(sys.argv[1])\n"
    "from grpo.report.write import write_report; write_report(pathlib.Path(sys.argv[2]), running=True)"
)


class LiveReport:
    """``after_step`` is called after each step, on the first process (``on``). A context manager: at its end nothing
    is being drawn any more, and the page does not call the run running."""

    def __init__(self, folder: Path, *, on: bool) -> None:
        self.folder, self.on = folder, on
        self._drawing: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._next = self._began + FIRST

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawing is not None:
            self._drawing.kill()
            self._drawing.communicate()
        if self.on:
            no_longer_running(self.folder)

    def after_step(self) -> None:
        """Begin to draw, where it is time to and nothing is being drawn."""
        now = time.monotonic()
        if self._drawing is not None and self._drawing.poll() is not None:
            self._end(self._drawing, now - self._began)
        if self.on and self._drawing is None and now >= self._next:
            self._began = now
            command = [sys.executable, "-I", "-c", DRAW, json.dumps(sys.path), str(self.folder)]
            self._drawing = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the run
            )

    def _end(self, drawing: subprocess.Popen[bytes], seconds: float) -> None:
        _, said = drawing.communicate()
        self._drawing, self._next = None, self._began + seconds / SHARE
        if drawing.returncode:
            self.on = False
            why = said.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {drawing.returncode}"]
            log.warning("report.html is not rewritten during the run: %s", printable(why[0]))
