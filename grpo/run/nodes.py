"""What a launch over several nodes needs beside what the launcher gave it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.files import write_whole
from grpo.prompts.task import Task
from grpo.run import peers
from grpo.run.manifest import MANIFEST
from grpo.run.same_run import differences

log = logging.getLogger("grpo")

PROBE = ".seen_by_all_nodes"  # in the run folder, for a moment
SECONDS_TO_APPEAR = 10.0
ROWS_COMPARED = 64
ELSEWHERE = "192.0.2.1"  # an address that nobody has (RFC 5737); asked for, it names the default route


def several_nodes() -> bool:
    """Whether the launcher started processes on more than this node."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_WORLD_SIZE") or world) < world


def choose_interface() -> None:
    """Have gloo listen where the other nodes reach this one, if ``GLOO_SOCKET_IFNAME`` does not name the interface.

    Left alone, gloo listens on the address that the host's name resolves to, which is 127.0.1.1 on Debian. NCCL chooses
    by itself, and not by name.

    Raises:
        UserError: this node has several networks and nothing says which one.
    """
    if not several_nodes() or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    interfaces = _interfaces()
    towards_first = _address_towards(os.environ.get("MASTER_ADDR", ""))
    # The first node's own name may be a loopback address. Then the network with the default route is a good guess.
    for address in (towards_first, _address_towards(ELSEWHERE), *(interfaces if len(interfaces) == 1 else ())):
        if address in interfaces:
            os.environ["GLOO_SOCKET_IFNAME"] = interfaces[address]
            return
    found = ", ".join(f"{name} ({address})" for address, name in interfaces.items()) or "none but the loopback"
    raise UserError(
        f"which network leads from {socket.gethostname()} to the other nodes? It has {found}. Name the interface on "
        "each node: export GLOO_SOCKET_IFNAME=eth0 (and NCCL_SOCKET_IFNAME, where GPUs train)"
    )


def watch_peers(accelerator: Accelerator, seconds: float, patience: float) -> None:
    """Notice when another process of this launch is lost; ``peers`` says how."""
    if accelerator.num_processes == 1:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    peers.watch(store, address, accelerator.process_index, accelerator.num_processes, seconds, patience)


def check_same_on_all(recipe: Recipe, task: Task) -> None:
    """Compare recipe and prompts over the processes, each of which has read its own files.

    Raises:
        UserError: on every process, where one's differ from the first one's.
    """
    if not dist.is_initialized():
        return
    mine = {"host": socket.gethostname(), "recipe": recipe.model_dump(mode="json"), "prompts": _digest(task)}
    first, *others = gather_object([mine])
    for rank, other in enumerate(others, start=1):
        who, whose = f"rank {rank} (on {other['host']})", f"rank 0 (on {first['host']})"
        if found := list(differences(first["recipe"], other["recipe"])):
            lines = "".join(f"\n  {key}: {theirs}, there {own}" for key, own, theirs in found)
            raise UserError(f"{who} was started with another recipe than {whose}:{lines}")
        if first["prompts"] != other["prompts"]:
            raise UserError(
                f"{who} reads other prompts than {whose}: the files of `data`, the tokenizer or the code of the task "
                "are not the same for both"
            )


def check_folder(folder: Path, accelerator: Accelerator) -> None:
    """See whether all nodes have the run folder that the first process has claimed. Called by all processes.

    Sharded weights are saved by all processes, so then it is an error where one has not; else it is one only on resume
    (``check_checkpoint``).

    Raises:
        UserError: on every process.
    """
    if not several_nodes() or not dist.is_initialized():
        return
    probe, (host, token) = folder / PROBE, broadcast_object_list([socket.gethostname(), uuid.uuid4().hex])
    if accelerator.is_main_process:
        write_whole(probe, token)
    blind = _blind(lambda: _appears(probe, token))
    if accelerator.is_main_process:
        probe.unlink(missing_ok=True)
    if not blind:
        return
    where = f"training.output_dir: {folder} on {blind} is not the folder that rank 0 (on {host}) writes"
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(f"{where}. With sharded weights all nodes write checkpoints: it must be on a disk they share")
    if accelerator.is_main_process:
        log.warning("%s. That will do until the run is resumed: all nodes read the checkpoint then", where)


def check_checkpoint(checkpoint: Path | None) -> None:
    """Raises UserError, on every process, where one does not see the checkpoint that the first process has chosen."""
    if checkpoint is None or not several_nodes() or not dist.is_initialized():
        return
    manifest = checkpoint / MANIFEST
    (content,) = broadcast_object_list([manifest.read_bytes() if dist.get_rank() == 0 else b""])
    if blind := _blind(lambda: manifest.exists() and manifest.read_bytes() == content):
        raise UserError(
            f"{checkpoint} is not there on {blind}, and every process reads the checkpoint that it resumes from. Put "
            "training.output_dir on a disk that all nodes share, or copy this folder to all of them"
        )


def _blind(sees: Callable[[], bool]) -> str:
    """The processes that do not see something, in words; empty where all do."""
    seen = gather_object([(socket.gethostname(), sees())])
    return ", ".join(f"rank {rank} (on {host})" for rank, (host, does) in enumerate(seen) if not does)


def _appears(path: Path, content: str) -> bool:
    """Whether a file has this content, now or soon: a network's filesystem may take its time."""
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while time.monotonic() < deadline:
        try:
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


def _digest(task: Task) -> str:
    """Of some rows over the whole training data, as token ids, and of how many there are."""
    rows = task.train.ids[:: -(-len(task.train) // ROWS_COMPARED)]
    as_tokens = task.example if task.stage == "sft" else lambda part, row: task.prompt(part, row).token_ids
    content = [len(task.train), [as_tokens(task.train, row) for row in rows]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _interfaces() -> dict[str, str]:
    """Names of the network interfaces that are up, by address, without the loopback and addresses of the link alone."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if name in up and address.family in (socket.AF_INET, socket.AF_INET6):
                parsed = ipaddress.ip_address(address.address.split("%")[0])
                if not parsed.is_loopback and not parsed.is_link_local:
                    found[str(parsed)] = name
    return found


def _address_towards(host: str) -> str | None:
    """This node's address on the way to ``host``, or None where there is none. Nothing is sent."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None
