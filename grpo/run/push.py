"""``grpo push``: which files of a run go to the hub, and their way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import RunError, UserError, first_line
from grpo.run.secrets import scrubbed

TEXT = (".json", ".jsonl", ".md", ".txt", ".jinja", ".yaml", ".yml", ".py", ".model", ".csv")
LARGEST_TEXT = 64 << 20  # bytes of a file that is looked through for secrets; a tokenizer's is a few of these
LEFT_OUT = ("adapter/README.md",)  # peft's template, which holds a path of this machine and nothing measured


@dataclass(frozen=True)
class Pushed:
    """A file on its way: where it lies, what it is called in the repository, its bytes."""

    path: Path
    name: str
    size: int


def files_to_push(run: Path, *, rollouts: bool) -> list[Pushed]:
    """The files of a run's final model (or of a model's folder), and with ``rollouts`` those of its completions.

    Raises UserError where there is no model, a link leads out of the folder, or a file holds what looks like a secret.
    """
    folder = run / "final" if (run / "final").is_dir() else run
    if not (folder / "config.json").is_file():
        raise UserError(f"{run}: has no final model yet (there is no final/config.json in it)")
    found = [Pushed(path, name, path.stat().st_size) for path, name in _inside(folder) if name not in LEFT_OUT]
    if rollouts:
        samples = run / "rollouts"
        if not samples.is_dir():
            raise UserError(f"{run}: has no rollouts (training.log_rollouts_every: 0?)")
        found += [Pushed(path, f"rollouts/{name}", path.stat().st_size) for path, name in _inside(samples)]
    suspicious = [file.name for file in found if _holds_secret(file)]
    if suspicious:
        raise UserError(
            f"{run}: nothing was pushed: {', '.join(suspicious[:5])} {'hold' if len(suspicious) > 1 else 'holds'} what "
            "looks like a secret (a key, a token, a URL with a password). Take it out first"
        )
    return sorted(found, key=lambda file: file.name)


def _inside(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files of a folder and their names in it; hidden ones and leftovers of a write are none."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or path.suffix == ".tmp":
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{path}: is a link that leads out of the folder; what it leads to is not pushed unasked")
        if path.is_file():
            yield path, name


def _holds_secret(file: Pushed) -> bool:
    if file.path.suffix not in TEXT or file.size > LARGEST_TEXT:
        return False
    text = file.path.read_text(encoding="utf-8", errors="replace")
    return scrubbed(text) != text


def check_repository(repository: str) -> None:
    """Raises UserError where this can be no repository's name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{repository}: no name of a repository: {first_line(error)}") from None


def push(files: Sequence[Pushed], repository: str, *, private: bool, api: Any = None) -> str:
    """Send files to a hub's repository in one commit, which makes it if there is none; returns its address.

    ``api`` is a ``huggingface_hub.HfApi``; None makes one, with the token of ``hf auth login`` or ``HF_TOKEN``.
    Raises UserError where the repository's name is none, nobody is logged in, or it is public and ``private`` asks for
    one that is not; RunError where the hub refuses or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if api is None and get_token() is None:
        raise UserError("nobody is logged in to the hub: hf auth login, or set HF_TOKEN")
    api = api or HfApi(library_name="grpo-train")
    try:
        try:
            is_public = not api.repo_info(repository).private
        except RepositoryNotFoundError:
            is_public = False
        if private and is_public:
            raise UserError(f"{repository} is there already and public; --public says that this may be seen by all")
        url = api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file.path)) for file in files]
        api.create_commit(url.repo_id, operations, commit_message="Model trained by grpo-train")
    except UserError:
        raise
    except Exception as error:  # a hub fails in many ways; all are told in one line
        raise RunError(f"{repository}: not pushed: {scrubbed(first_line(error))}") from error
    return str(url)
