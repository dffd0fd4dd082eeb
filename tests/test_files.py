"""Files and folders that are there whole or not at all, who is killed or refused; modes follow the umask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo.files import usual_modes, whole_folder, write_whole
from tests.launching import DIES

ROOT = Path(__file__).parent.parent


def write(final: Path, content: str) -> None:
    with whole_folder(final) as aside:
        (aside / "one").write_text(content)
        (aside / "below").mkdir()
        (aside / "below" / "two").write_text(content)


def test_a_folder_comes_whole_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    final = tmp_path / "runs" / "final"
    for content in ("old", "new"):
        write(final, content)
        assert (final / "below/two").read_text() == content
        assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_where_the_disk_refuses_nothing_is_left_but_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "final"
    mkdir = Path.mkdir

    def full(self: Path, **keywords: bool) -> None:
        if self.name == "below":
            raise OSError(28, "No space left on device")
        mkdir(self, **keywords)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space"):
        write(final, "half")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    write(final, "old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        write(final, "new")
    assert (final / "one").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


KILLER = (
    DIES
    + """
    import json, os, sys
    from pathlib import Path
    from grpo.files import whole_folder

    def write(final, content):
        with whole_folder(final) as aside:
            for name in ("one", "two"):
                (aside / name).write_text(content)

    def save_and_die(final, moment):
        die_after(moment)
        write(final, "new")
        os._exit(0)

    found, killed = [], True
    while killed:
        final = Path(sys.argv[1]) / str(len(found)) / "final"
        write(final, "old")
        if not (child := os.fork()):
            save_and_die(final, len(found) + 1)
        killed = os.waitpid(child, 0)[1] != 0
        seen = [path.read_text() for path in sorted(final.iterdir())] if final.exists() else []
        kept = final.with_name("final.old").exists()
        write(final, "again")
        found.append([seen, kept, sorted(path.name for path in final.parent.iterdir())])
    print(json.dumps(found))
"""
)


def test_a_kill_at_any_moment_leaves_no_half_folder_under_the_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) > 7
    assert {tuple(seen) for seen, _, _ in outcomes} == {("old", "old"), ("new", "new"), ()}
    assert all(kept for seen, kept, _ in outcomes if not seen), "the old one is then beside it"
    assert all(left == ["final"] for _, _, left in outcomes)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_follow_the_umask_though_safetensors_does_not(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").touch()
        usual_modes(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "model.safetensors": mode,
        "config.json": mode,
    }


def test_it_writes_text_and_bytes_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    write_whole(path, "naïve 😀 \udc80\n")
    assert path.read_bytes() == "naïve 😀 \\udc80\n".encode()
    write_whole(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(tmp_path.iterdir()) == [path]


def test_where_the_disk_refuses_the_old_content_stays_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")

    def half(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new content")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_an_error_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "inside").touch()
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
