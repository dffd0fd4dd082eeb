"""A Python session as a tool, in the sandbox of the code reward: no files, no network, no processes."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.code_workers import prepare, programs_of, start
from rewards.sandbox import Limits, Session

MAX_CALLS = 100  # as many times ``timeout`` of CPU time is all that a session gets


class Python:
    """One tool, ``python``, which runs code. Variables live on from call to call, and nothing of the row is in there.
    It pays nothing: the recipe's other rewards do.

    ``timeout`` is in seconds for a call, ``memory_mb`` the session's address space, ``max_output`` in characters for a
    call. ``packages`` may be imported beside the standard library. ``allow_unsafe`` runs even where nothing isolates.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        memory_mb: int = 512,
        max_output: int = 1000,
        packages: Sequence[str] = (),
        allow_unsafe: bool = False,
    ) -> None:
        self.limits = Limits(timeout, memory_mb, max_output)
        self.packages, self.allow_unsafe = tuple(packages), allow_unsafe
        self.session: Session | None = None

    @classmethod
    def prepare(cls, *, packages: Sequence[str] = (), allow_unsafe: bool = False, **_: object) -> None:
        """Try the sandbox, once for all episodes."""
        prepare(allow_unsafe=allow_unsafe, packages=tuple(packages))

    def reset(self, **row: object) -> None:
        """A session of its own for each episode. It starts with the first call."""
        if self.session is not None:
            self.session.close()
        self.session = None

    def python(self, code: str) -> str:
        """Run Python code. You get what it prints and the value of its last line. Variables are kept for the next call.

        Args:
            code: The code to run.

        Returns:
            The output, or the error.
        """
        if not code.strip():
            raise ValueError("there is no code")
        if self.session is None:
            start(1, allow_unsafe=self.allow_unsafe, packages=self.packages)
            self.session = Session(programs_of(self.packages), self.limits, MAX_CALLS)
        said = self.session.run(code)
        if said.ended:
            raise RuntimeError(f"{said.ended} and was stopped. The session is new: its variables are gone")
        output = said.output
        if said.left_out:
            output += f"\n… {said.left_out} more characters"
        told = "\n".join(filter(None, (output.rstrip("\n"), said.error)))
        return told or "(no output)"
