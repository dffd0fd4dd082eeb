"""Environments behind an OpenEnv server (Meta's and Hugging Face's), as games: `pip install 'grpo-train[openenv]'`.

    environment:
      path: grpo.environments.openenv:OpenEnv
      args: {base_url: "http://localhost:8000", action: message, observation: text}

Each episode has a session of its own on the server, over a web socket, so the server must allow as many at a time as a
step has completions (``max_concurrent_envs``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

OF_PROTOCOL = ("done", "reward", "metadata")  # fields of every observation, which are not shown


class OpenEnv:
    """A turn's text becomes the field ``action`` of the server's action, beside those of ``with_action``. Of what the
    server observes the field ``observation`` is shown, or all fields as JSON. The row's columns ``reset_with`` (such as
    ``seed``) go to the server's ``reset``. What the server pays for a step is the turn's reward.

    Raises:
        ImportError: the package ``openenv-core`` is not installed.
        ConnectionError: there is no server at ``base_url``.
    """

    def __init__(
        self,
        *,
        base_url: str,
        action: str = "message",
        with_action: dict[str, Any] | None = None,
        observation: str | None = None,
        reset_with: Sequence[str] = (),
        message_timeout: float = 60.0,
    ) -> None:
        try:
            from openenv.core import GenericEnvClient
        except ImportError as why:
            raise ImportError(f"{why}: pip install 'grpo-train[openenv]'") from why
        self.action, self.with_action = action, with_action or {}
        self.observation, self.reset_with = observation, tuple(reset_with)
        self._client = GenericEnvClient(base_url=base_url, message_timeout_s=message_timeout).sync()
        self._client.connect()

    def reset(self, **row: Any) -> str:
        if missing := [name for name in self.reset_with if name not in row]:
            raise ValueError(f"reset_with: the row has no column {missing[0]!r}, but {', '.join(row)}")
        try:
            result = self._client.reset(**{name: row[name] for name in self.reset_with})
        except Exception as why:
            if not type(why).__name__.startswith("ConnectionClosed"):  # of websockets, which the package brings
                raise
            raise ConnectionError(
                f"the server ended the session before it began ({why}); does it allow as many at a time as a step has "
                "completions (max_concurrent_envs)?"
            ) from why
        return self._shown(result.observation)

    def step(self, text: str) -> tuple[str, float | None, bool]:
        result = self._client.step({self.action: text, **self.with_action})
        return self._shown(result.observation), result.reward, bool(result.done)

    def _shown(self, observation: dict[str, Any]) -> str:
        fields = {name: value for name, value in observation.items() if name not in OF_PROTOCOL}
        if self.observation is None:
            only = next(iter(fields.values())) if len(fields) == 1 else None
            return only if isinstance(only, str) else json.dumps(fields, ensure_ascii=False)
        if self.observation not in fields:
            raise KeyError(f"observation: the server observes no {self.observation!r}, but {', '.join(fields)}")
        said = fields[self.observation]
        return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
