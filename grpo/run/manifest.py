"""A checkpoint's manifest: the sha256 of every file and of itself. Written last, and what verifies the checkpoint."""

from __future__ import annotations

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


class DamagedCheckpoint(Exception):
    """A checkpoint does not verify; the message names the file and what is wrong with it."""


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


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file has the size and hash that it names. Raises DamagedCheckpoint otherwise."""
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
            hashes = pool.map(lambda name: _sha256(path / name), files)
        for (name, expected), found in zip(files.items(), hashes, strict=True):
            if found != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} has changed since it was written (sha256 differs)")
    except OSError as error:
        raise DamagedCheckpoint(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not readable ({error})") from error
    return manifest


def facts(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
