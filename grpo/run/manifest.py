"""A checkpoint's manifest: the sha256 of every file and of itself. Written last, and what verifies the checkpoint."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.files import fsync

MANIFEST = "manifest.json"
SHARDS = "shards"
FORMAT = 1
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # what is not there was lost; all else may be readable tomorrow


class DamagedCheckpoint(Exception):
    """A checkpoint does not verify; the message names the file and what is wrong with it."""


class UnreadableCheckpoint(Exception):
    """The system did not let a checkpoint be read (rights, a disk's error, memory); its state is not known."""


def write_manifest(folder: Path, content: dict[str, Any], shards: dict[str, dict[str, Any]]) -> None:
    """Hash the files in ``folder`` (the facts of ``shards`` are given), and write what is known of the checkpoint."""
    files = {path.name: facts(path) for path in sorted(folder.iterdir()) if path.is_file()}
    files |= {f"{SHARDS}/{name}": shards[name] for name in sorted(shards)}
    # A trip through JSON first: what is hashed must be what a reader will get (lists for tuples, strings for keys).
    content = json.loads(json.dumps({"format": FORMAT, **content, "files": files}))
    content["checksum"] = _checksum(content)
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fsync(path)
    fsync(folder)


def read_manifest(path: Path) -> dict[str, Any]:
    """Of a checkpoint that was verified."""
    return json.loads((path / MANIFEST).read_bytes().decode("utf-8"))


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file has the size and hash that it names.

    Raises:
        DamagedCheckpoint: one has not.
        UnreadableCheckpoint: one could not be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes().decode("utf-8"))
        files, checksum = manifest["files"], manifest.pop("checksum")
        if checksum != _checksum(manifest):
            raise DamagedCheckpoint(f"{MANIFEST} does not match its own checksum")
        if manifest["format"] != FORMAT:
            raise DamagedCheckpoint(f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}")
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise DamagedCheckpoint(f"{name} has {size:,} bytes instead of {expected['bytes']:,}")
        with ThreadPoolExecutor(max_workers=8) as pool:  # hashing and reading leave the interpreter's lock
            hashes = pool.map(lambda name: sha256(path / name), files)
        for (name, expected), found in zip(files.items(), hashes, strict=True):
            if found != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} has changed since it was written (sha256 differs)")
    except OSError as error:
        kind = DamagedCheckpoint if error.errno in GONE else UnreadableCheckpoint
        raise kind(f"{Path(error.filename or path).name}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not readable ({error})") from error
    return manifest


def facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
