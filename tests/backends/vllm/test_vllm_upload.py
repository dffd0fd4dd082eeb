"""Files sent to a server on another machine: what is taken, what is passed on, and to whom they are sent."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from grpo.backends.vllm import transfer
from grpo.backends.vllm.upload import Uploads
from tests.conftest import make_recipe


async def passed_on(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 418})
    await send({"type": "http.response.body", "body": b"{}"})


def ask(uploads: Uploads, verb: str, path: str, *parts: bytes, broken: bool = False) -> tuple[int, dict[str, Any]]:
    """Status and answer; (0, {}) where there is none."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.disconnect"} if broken else {"type": "http.request", "body": b""})
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(uploads({"type": "http", "method": verb, "path": path}, receive, send))
    return (sent[0]["status"], json.loads(sent[1]["body"])) if sent else (0, {})


@pytest.fixture
def uploads() -> Uploads:
    return Uploads(passed_on)


def test_what_is_sent_lies_in_the_folder_that_is_answered(uploads: Uploads) -> None:
    status, answer = ask(uploads, "POST", "/grpo/upload/weights/model.safetensors", b"one ", b"two")
    folder = Path(answer["folder"])
    assert (status, folder.name) == (200, "weights")
    assert ask(uploads, "POST", "/grpo/upload/weights/config.json", b"{}")[0] == 200
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {"model.safetensors": b"one two", "config.json": b"{}"}
    assert ask(uploads, "DELETE", "/grpo/upload/weights") == (200, {})
    assert not folder.exists()
    assert ask(uploads, "DELETE", "/grpo/upload/weights") == (200, {})  # there is nothing, as wished


def test_a_file_that_did_not_come_whole_is_no_file(uploads: Uploads) -> None:
    folder = Path(ask(uploads, "POST", "/grpo/upload/weights/a", b"whole")[1]["folder"])
    assert ask(uploads, "POST", "/grpo/upload/weights/b", b"ha", broken=True) == (0, {})
    assert [f.name for f in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["a/../b", "../b", "a", "a/b/c", "/b", "a/", ".a/b", "a/.b"])
def test_only_files_of_sets_are_taken(uploads: Uploads, path: str) -> None:
    assert ask(uploads, "POST", f"/grpo/upload/{path}", b"x")[0] == 404
    assert not list(Path(uploads.folder.name).rglob("*"))


def test_everything_else_is_the_servers(uploads: Uploads) -> None:
    assert ask(uploads, "POST", "/generate")[0] == 418


def test_a_full_disk_is_told(uploads: Uploads) -> None:
    (Path(uploads.folder.name) / "weights").write_text("a file where a folder must be")
    status, answer = ask(uploads, "POST", "/grpo/upload/weights/a", b"x")
    assert status == 507
    assert "GB free: " in answer["error"]


@pytest.mark.parametrize(
    ("urls", "folder", "way"),
    [
        (["http://127.0.0.1:8000", "http://localhost:8001", "http://[::1]:8000"], None, "path"),
        (["http://127.0.0.1:8000", "http://192.0.2.1:8000"], None, "http"),
        (["http://192.0.2.1:8000"], "/shared", "path"),
        (["http://no-such-host.invalid:8000"], None, "http"),
    ],
)
def test_files_are_sent_to_servers_on_other_machines_alone(
    tmp_path: Path, urls: list[str], folder: str | None, way: str
) -> None:
    rollout = {"backend": "vllm", "vllm_mode": "server", "vllm_server_base_url": urls, "vllm_sync_dir": folder}
    assert transfer.choose_way(make_recipe(tmp_path, rollout=rollout), on_gpu=False) == way
