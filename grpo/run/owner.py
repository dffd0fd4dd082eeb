"""Whose run folder it is: its recipe may name code, which is executed only where this user has made it, or says so.

A run signs its recipe with a key that only this user can read, in ``~/.local/state/grpo``. So a folder that another
user or another machine made has no valid mark here, nor has one whose recipe was changed since. Machines that share a
home directory share the key.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.files import write_whole
from grpo.run.named_files import environment_places
from grpo.user_code import is_place

log = logging.getLogger("grpo")

MARK = ".made_here"
SIGNED = ("recipe.yaml", "environment.json")
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4", "paged")


def sign(folder: Path) -> None:
    """Leave this user's mark in a run folder, once its recipe and environment are written."""
    try:
        write_whole(folder / MARK, _signature(folder, _key()) + "\n")
    except OSError as error:
        log.info("%s is not marked as yours (%s): grpo eval will ask for --trust if it has code", folder, error)


def check_own_code(folder: Path, recipe: Recipe) -> None:
    """Raise UserError where a run folder's recipe names code and this user has not made the folder here."""
    code = list(code_of(recipe))
    if code and (why := why_not_own(folder)):
        lines = "".join(f"\n  {key}: {value}" for key, value in code)
        raise UserError(
            f"{folder} was made by somebody else or on another machine ({why}), and its recipe has code that would be "
            f"executed:{lines}\nRead that code first. Then --trust executes it; an override replaces it."
        )


def why_not_own(folder: Path) -> str | None:
    """Why a run folder does not count as made by this user on this machine; None where it does."""
    for path in (folder, *(folder / name for name in (*SIGNED, MARK, "final"))):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if status.st_uid != os.geteuid():
                return f"{path.name} belongs to user {status.st_uid}"
            if status.st_mode & 0o002 and path.name != MARK:
                return f"everybody may write to {path.name}"
    try:
        mark = (folder / MARK).read_text(encoding="utf-8").strip()
        known = hmac.compare_digest(mark.encode(), _signature(folder, _key(make=False)).encode())
    except FileNotFoundError:
        return "it does not have the mark of a run of yours"
    except (OSError, ValueError, RecursionError) as error:
        return f"its mark can't be read: {error}"
    return None if known else "its mark is not yours, or its recipe was changed since"


def code_of(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Keys of a recipe that have code executed, with their values: the user's own, a model's, or without a sandbox."""
    for index, reward in enumerate(recipe.functions()):
        if reward.path:
            yield f"{reward.where(index)}.path", reward.path
        if reward.args.get("allow_unsafe"):
            yield f"{reward.where(index)}.args.allow_unsafe", "programs of the model without a sandbox"
    yield from environment_places(recipe).items()
    if recipe.environment is not None and recipe.environment.args.get("allow_unsafe"):
        yield "environment.args.allow_unsafe", "programs of the model without a sandbox"
    sources = recipe.data.sources()
    places = {
        "algorithm.loss_type": recipe.algorithm.loss_type,
        **{f"{source.where}.name": source.rows.name for source in sources},
        "rollout.backend": recipe.rollout.backend,
    }
    yield from ((key, place) for key, place in places.items() if place and is_place(place))
    attention = recipe.model.attn_implementation
    settings = {
        "model.trust_remote_code": recipe.model.trust_remote_code,
        "model.attn_implementation": attention if attention and not attention.startswith(ATTENTION) else None,
        **{f"{source.where}.args.trust_remote_code": source.rows.args.get("trust_remote_code") for source in sources},
        "rollout.vllm_python": recipe.rollout.vllm_python,
        "rollout.vllm_args": recipe.rollout.vllm_args,
    }
    yield from ((key, value) for key, value in settings.items() if value)


def _signature(folder: Path, key: bytes) -> str:
    content = (folder / "recipe.yaml").read_bytes()
    environment = json.loads((folder / "environment.json").read_bytes())
    host = environment.get("host") if isinstance(environment, dict) else None
    return hmac.new(key, json.dumps([str(host), os.geteuid()]).encode() + content, "sha256").hexdigest()


def _key(*, make: bool = True) -> bytes:
    """This user's key. Raises OSError where there is none, and none can be made."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "grpo" / "run_key"
    if make and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with contextlib.suppress(FileExistsError), open(file, "xb", opener=_private) as opened:
            opened.write(secrets.token_bytes(32))
    key = file.read_bytes()
    if len(key) < 32 or file.stat().st_uid != os.geteuid():
        raise PermissionError(f"{file} is not a key of this user")
    return key


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
