"""Tensors that are split over processes, in files that all processes write and read (torch.distributed.checkpoint).

Each process writes the parts that it holds to files of its own, and reads the parts that it needs, from whichever files
hold them. So a checkpoint of two processes can be read by one, whose tensors are whole, and by four.
"""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from grpo.errors import RunError, first_line

METADATA = ".metadata"
# What torch's description of a checkpoint is made of: classes of these modules, shapes and types. Nothing else is
# loaded, because unpickling can run any code.
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem", "pathlib")
_OTHERS = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")}
_OTHERS |= {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

# It says at every call which process coordinates, and that one process alone is not distributed.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> list[Path]:
    """Write this process's parts of ``tensors`` into ``folder``, synced to the disk. Returns the files that it wrote.
    Called by all processes with the same names; a tensor that is not sharded must be the same on all.

    Raises:
        RunError: the disk of a process refuses. On every process.
    """
    try:
        dcp.save(dict(tensors), storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:
        which, why = next(iter(error.failures.items()))
        raise RunError(f"rank {which} could not write its shard to {folder}: {first_line(why[0])}") from None
    mine = sorted(folder.glob(f"__{rank}_*.distcp"))
    return [*mine, folder / METADATA] if rank == 0 else mine


def read_shards(folder: Path, into: dict[str, torch.Tensor], *, together: bool) -> None:
    """Copy what ``folder`` holds into these tensors, each process its own parts. ``together``: they are sharded, and
    all processes call this."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to load in a single process"
        dcp.load(dict(into), storage_reader=_Reader(folder), no_dist=not together)


def stored_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of each tensor that ``folder`` holds, as it is when whole."""
    stored = _Reader(folder).read_metadata().state_dict_metadata
    return {n: (f.size, f.properties.dtype) for n, f in stored.items() if isinstance(f, TensorStorageMetadata)}


class _Reader(FileSystemReader):
    """torch's reader, whose description of the checkpoint can run no code."""

    def read_metadata(self, *arguments: Any, **keywords: Any) -> Metadata:
        found = _Unpickler(io.BytesIO((Path(self.path) / METADATA).read_bytes())).load()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if "." not in name else None
        if (module, name) in _OTHERS or (module.startswith(_MODULES) and isinstance(found, type)):
            return found
        raise RunError(f"{METADATA} of a checkpoint asks for {module}.{name}, which is in no checkpoint of a run")
