"""Three ways to hand weights to an engine: a file that it reads, handles of GPU memory, a broadcast between GPUs.

Every training process calls a sender with the same state. ``servers`` are those that the process keeps, often none.
On return the servers hold the weights.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from accelerate.utils import gather_object

from grpo.backends.vllm.api import Server, ServerGone, WeightSource, cast, nccl_sending_end, why_no_nccl
from grpo.backends.vllm.pool import Pool
from grpo.config import Recipe
from grpo.errors import BackendFailed, UserError
from grpo.model.policy import Policy

log = logging.getLogger("grpo")

CHUNK_BYTES = 1 << 30  # cast and shared at once over CUDA IPC

State = dict[str, torch.Tensor]


class Sender(Protocol):
    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        """Give ``state``, cast to ``dtype``, to all ``servers``. Returns the servers that failed, and why."""
        ...


class PathSender:
    """Writes a safetensors file that the servers read, in shared memory or on a disk that they share.

    Raises:
        BackendFailed: there is no room for it.
    """

    def __init__(self, pool: Pool, folder: Path, timeout: float):
        self.pool, self.folder, self.timeout = pool, folder, timeout

    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        if not servers:
            return {}
        folder = self.folder / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            _write(_without_ties(state), dtype, folder)
            return self.pool.run(on_each(servers, lambda server: server.load(str(folder), self.timeout)))
        finally:
            shutil.rmtree(folder)


def _write(state: State, dtype: torch.dtype, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in cast(state, dtype)}
    try:
        save_file(tensors, folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise BackendFailed(
            f"cannot write the weights for vllm ({size / 1e9:.2f} GB) in {folder}, which has "
            f"{shutil.disk_usage(folder).free / 1e9:.2f} GB free: {error}. Set rollout.vllm_sync_dir to a folder with "
            "room that the servers see too (a container's /dev/shm grows with --shm-size)"
        ) from None


class IpcSender:
    """Shares GPU memory with an engine on the same devices. Nothing is copied through the host.

    Every process of the engine's group contributes the handles of its own device.
    """

    def __init__(self, pool: Pool, gather: Callable[[Any], list[Any]], timeout: float):
        self.pool, self.gather, self.timeout = pool, gather, timeout
        self.unfinished: set[str] = set()  # servers on which an update was begun and has not ended

    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        failed: dict[str, str] = {}
        refused: list[Exception] = []

        def post(work: Callable[[Server], Any]) -> None:
            """Do it on the servers that have not failed. A refusal is raised only after the last exchange of handles:
            the group's other processes take part in each."""
            if not refused:
                up = [server for server in servers if server.url not in failed]
                try:
                    failed.update(self.pool.run(on_each(up, work)))
                except BackendFailed as refusal:
                    refused.append(refusal)

        post(self._begin)
        for chunk in _chunks(state, dtype):
            tensors = [tensor.contiguous() for _, tensor in chunk]
            mine = [handle_of(tensor) for tensor in tensors]
            handles = [
                {k: v for part in parts for k, v in part.items()} for parts in zip(*self.gather(mine), strict=True)
            ]
            info = {
                "names": [name for name, _ in chunk],
                "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
                "shapes": [list(tensor.shape) for tensor in tensors],
                "ipc_handles_pickled": base64.b64encode(pickle.dumps(handles)).decode(),
            }
            post(partial(_update, info=info, timeout=self.timeout))
            self.gather(None)  # wait: another process's worker may still read this chunk
        post(self._end)
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
        if refused:
            raise refused[0]
        return failed

    async def _begin(self, server: Server) -> None:
        if server.url in self.unfinished:
            await server.abandon_update(self.timeout)
        self.unfinished.add(server.url)
        await server.init_transfer({"packed": False}, self.timeout)
        await server.start_update(self.timeout)

    async def _end(self, server: Server) -> None:
        await server.finish_update(self.timeout)
        self.unfinished.discard(server.url)


def handle_of(tensor: torch.Tensor) -> dict[str, Any]:
    """What another process opens this tensor's GPU memory with, by the GPU's name."""
    from torch.multiprocessing.reductions import reduce_tensor

    return {str(torch.cuda.get_device_properties(tensor.device).uuid): reduce_tensor(tensor)[1]}


class NcclSender:
    """Broadcasts from the first process's GPU to those of all servers at once, in a group of its own with each.

    vLLM's sending end must be installed here too (``api.why_no_nccl``). It holds two buffers of a gigabyte a server.
    """

    def __init__(self, pool: Pool, host: str | None, first_port: int, timeout: float, device: torch.device):
        self.pool, self.host, self.first_port, self.timeout = pool, host, first_port, timeout
        self.device = device
        self.ends: dict[str, Any] = {}
        self.unfinished: set[str] = set()  # servers whose last transfer broke off

    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        done: dict[str, Any] = {}  # the sending ends of servers that hold the weights
        why = {server.url: f"no end within {self.timeout:g} s" for server in servers}
        raised: list[Exception] = []

        def give(server: Server) -> None:
            try:
                with on_device(self.device):  # a thread begins on the first one
                    done[server.url] = self._give(server, state, dtype)
            except (ServerGone, OSError, RuntimeError) as error:  # requests' errors are OSErrors, NCCL's RuntimeErrors
                why[server.url] = str(error)
            except Exception as error:
                raised.append(error)

        # A thread each, for which the process does not wait at its end: a server that hangs within NCCL holds its own.
        threads = [threading.Thread(target=give, args=(server,), daemon=True) for server in servers]
        deadline = time.monotonic() + self.timeout
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if raised:
            raise raised[0]
        failed = {url: f"NCCL weight transfer: {why[url]}" for url in why if url not in done}
        self.unfinished = (self.unfinished | set(failed)) - set(done)
        self.ends = {url: end for url, end in (self.ends | done).items() if url not in failed}
        return failed

    def _give(self, server: Server, state: State, dtype: torch.dtype) -> Any:
        """The sending end of a server, after it has sent."""
        if server.url in self.unfinished:
            self.pool.run(server.abandon_update(self.timeout))
        end = self.ends.get(server.url)
        if end is None:
            settings = self.pool.run(server.settings())
            workers = settings["parallel_config"]["tensor_parallel_size"]
            port = self.first_port + self.pool.servers.index(server)
            end = nccl_sending_end(server.url, self.host or address_towards(server.url), port, workers, self.timeout)
        end.source = WeightSource(state, dtype)
        end.send_weights()
        return end


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """What this thread does on GPUs without naming one is done on this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def address_towards(url: str) -> str:
    """This machine's address on the interface that leads to a server.

    Not that of this machine's name, which many a machine's own table says is 127.0.1.1. Raises OSError where no
    interface leads there.
    """
    there = urlsplit(url)
    family, kind, protocol, _, address = socket.getaddrinfo(there.hostname, there.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # sends nothing
        return probe.getsockname()[0]


async def _update(server: Server, info: dict[str, Any], timeout: float) -> None:
    await server.update(info, timeout)


def choose_way(recipe: Recipe, *, on_gpu: bool) -> str:
    """``path``, ``ipc`` or ``nccl``, as ``rollout.vllm_weight_transfer`` says or as fits. The first process chooses.

    Raises:
        UserError: the recipe's way is not open here.
    """
    rollout = recipe.rollout
    way, server = rollout.vllm_weight_transfer, rollout.vllm_mode == "server"
    if not on_gpu and way in ("ipc", "nccl"):
        raise UserError(f"rollout.vllm_weight_transfer: {way} needs GPUs; path works without")
    if way == "auto" and not server:
        return "ipc" if on_gpu else "path"
    if not on_gpu or way not in ("auto", "nccl"):
        return "path" if way == "auto" else way
    if (why := why_no_nccl()) is None:
        return "nccl"
    if way == "nccl":
        raise UserError(
            f"rollout.vllm_weight_transfer: nccl needs the servers' vLLM beside the trainer too: {why}. Install it "
            "here, or set it to path, with rollout.vllm_sync_dir a folder that trainer and servers see"
        )
    log.info(
        "rollout.vllm_weight_transfer: auto is path here, files in %s: %s, and nccl needs it",
        rollout.vllm_sync_dir or "/dev/shm (servers on other machines need rollout.vllm_sync_dir)",
        why,
    )
    return "path"


def make_sender(way: str, recipe: Recipe, policy: Policy, pool: Pool, folder: Path) -> Sender:
    """The sender of a way of ``choose_way``."""
    rollout, timeout = recipe.rollout, recipe.rollout.vllm_sync_timeout
    if way == "path":
        return PathSender(pool, folder, timeout)
    if way == "nccl":
        return NcclSender(pool, rollout.vllm_group_host, rollout.vllm_group_port, timeout, policy.device)
    size, rank = rollout.vllm_tensor_parallel_size, policy.accelerator.process_index
    first = rank - rank % size
    return IpcSender(pool, lambda value: gather_object([value])[first : first + size], timeout)


def _without_ties(state: State) -> State:
    """Each tensor in memory once, by its first name: a tied output head is not sent twice."""
    first = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    return {name: tensor for name, tensor in state.items() if first[tensor.data_ptr()] == name}


def _chunks(state: State, dtype: torch.dtype) -> Iterator[list[tuple[str, torch.Tensor]]]:
    chunk, size = [], 0
    for name, tensor in cast(state, dtype):
        chunk.append((name, tensor))
        size += tensor.nbytes
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


async def on_each(servers: list[Server], work: Callable[[Server], Any]) -> dict[str, str]:
    """Do ``work`` on all servers at once. Returns the servers that are gone, and why."""
    found = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
    failed = {}
    for server, outcome in zip(servers, found, strict=True):
        if isinstance(outcome, ServerGone):
            failed[server.url] = str(outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
    return failed
