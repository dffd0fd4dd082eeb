"""What goes to the hub: the model and its card, no secret, nothing from elsewhere, private unless asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from typer.testing import CliRunner

from grpo.cli.main import app
from grpo.errors import RunError, UserError
from grpo.run.push import files_to_push, push


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    for name, text in {
        "final/config.json": "{}",
        "final/model.safetensors": "weights",
        "final/README.md": "# x",
        "final/adapter/adapter_model.safetensors": "a",
        "final/adapter/README.md": "base_model: /home/me/x",
        "final/.cache/x": "hidden",
        "final/left.tmp": "half",
        "rollouts/step_000001.jsonl": "{}",
        "environment.json": "{}",
        "metrics.jsonl": "",
        "checkpoints/step_000001/model.pt": "big",
    }.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)
    return run


class Hub:
    """A hub that records what it is asked for. ``there`` is the repository that it has: None, private or public."""

    def __init__(self, there: str | None = None, fails: Exception | None = None):
        self.there, self.fails, self.calls = there, fails, []

    def repo_info(self, name: str) -> Any:
        if self.fails:
            raise self.fails
        if self.there is None:
            response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
            raise RepositoryNotFoundError("404", response=response)
        return SimpleNamespace(private=self.there == "private")

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        self.calls.append(("create", name, private))

        class Url(str):
            repo_id = f"me/{name}"

        return Url(f"https://huggingface.co/me/{name}")

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        self.calls.append(("commit", repo_id, [operation.path_in_repo for operation in operations]))


MODEL = ["README.md", "adapter/adapter_model.safetensors", "config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_the_model_goes_and_rollouts_only_where_asked_for(a_run: Path) -> None:
    assert [file.name for file in files_to_push(a_run, rollouts=False)] == MODEL
    assert [file.name for file in files_to_push(a_run, rollouts=True)] == [*MODEL, "rollouts/step_000001.jsonl"]
    assert [file.name for file in files_to_push(a_run / "final", rollouts=False)] == MODEL


def test_it_is_private_unless_asked_and_one_commit(a_run: Path) -> None:
    hub = Hub()
    files = files_to_push(a_run, rollouts=False)
    assert push(files, "x", private=True, api=hub) == "https://huggingface.co/me/x"
    assert hub.calls == [("create", "x", True), ("commit", "me/x", MODEL)]


def test_a_public_repository_is_not_written_to_unasked(a_run: Path) -> None:
    hub, files = Hub("public"), files_to_push(a_run, rollouts=False)
    with pytest.raises(UserError, match="public; --public says"):
        push(files, "x", private=True, api=hub)
    assert hub.calls == []
    push(files, "x", private=False, api=hub)
    assert hub.calls[0] == ("create", "x", False)


def test_a_file_that_holds_a_secret_stops_it(a_run: Path) -> None:
    (a_run / "final/README.md").write_text("by hf_abcdefghijklmnopqrstuv")
    with pytest.raises(UserError, match=r"nothing was pushed: README.md holds what looks like a secret"):
        files_to_push(a_run, rollouts=False)


def test_a_link_that_leads_elsewhere_stops_it(a_run: Path, tmp_path: Path) -> None:
    (tmp_path / "private.txt").write_text("mine")
    (a_run / "final/notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(UserError, match="a link that leads out of the folder"):
        files_to_push(a_run, rollouts=False)


def test_a_run_without_a_model_and_a_hub_that_refuses_are_one_line(a_run: Path) -> None:
    files = files_to_push(a_run, rollouts=False)
    with pytest.raises(RunError, match=r"^x: not pushed: no route$"):
        push(files, "x", private=True, api=Hub(fails=ConnectionError("no route\nmore")))
    with pytest.raises(UserError, match="no name of a repository"):
        push(files, "a/b/c", private=True, api=Hub())
    (a_run / "final/config.json").unlink()
    with pytest.raises(UserError, match="has no final model yet"):
        files_to_push(a_run, rollouts=False)


def test_a_dry_run_lists_and_sends_nothing(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.run.push.push", lambda *_, **__: pytest.fail("it was sent"))
    result = CliRunner().invoke(app, ["push", str(a_run), "me/x", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == MODEL
    assert result.stdout.splitlines()[-1].endswith("  7 bytes")
    assert result.stderr == "4 files, 13 bytes would go to me/x (private); nothing was sent\n"
    misnamed = CliRunner().invoke(app, ["push", str(a_run), "me/my model", "--dry-run"])
    assert (misnamed.exit_code, misnamed.stdout) == (2, "")
    assert "me/my model: no name of a repository" in misnamed.stderr


def test_nobody_logged_in_is_said(a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        push(files_to_push(a_run, rollouts=False), "x", private=True)
