"""Three ways to hand weights to an engine: a file that it reads, handles of GPU memory, a broadcast between GPUs.

Every training process calls a sender with the same state. ``servers`` are those that the process keeps, often none.
On return the servers hold the weights.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object

from grpo.backends.vllm.api import Server, ServerGone, WeightSource, cast, nccl_sending_end
from grpo.backends.vllm.pool import Pool
from grpo.config import Recipe
from grpo.errors import BackendFailed, UserError
from grpo.model.policy import Policy

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
        self.greeted: set[str] = set()

    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        from torch.multiprocessing.reductions import reduce_tensor

        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        failed: dict[str, str] = {}

        def post(work: Callable[[Server], Any]) -> None:
            up = [server for server in servers if server.url not in failed]
            failed.update(self.pool.run(on_each(up, work)))

        post(lambda server: server.init_transfer({"packed": False}, self.timeout))
        post(lambda server: server.start_update(self.timeout))
        for chunk in _chunks(state, dtype):
            tensors = [tensor.contiguous() for _, tensor in chunk]
            mine = [{uuid: reduce_tensor(tensor)[1]} for tensor in tensors]
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
        post(lambda server: server.finish_update(self.timeout))
        torch.cuda.ipc_collect()
        return failed


class NcclSender:
    """Broadcasts from the first process's GPU to each server's. vLLM's sending end must be installed here too."""

    def __init__(self, pool: Pool, address: str, first_port: int, timeout: float):
        self.pool, self.address, self.first_port, self.timeout = pool, address, first_port, timeout
        self.ends: dict[str, Any] = {}

    def send(self, servers: list[Server], state: State, dtype: torch.dtype) -> dict[str, str]:
        failed = {}
        for server in servers:
            place = self.pool.servers.index(server)
            try:
                if server.url not in self.ends:
                    settings = self.pool.run(server.settings())
                    workers = settings["parallel_config"]["tensor_parallel_size"]
                    port = self.first_port + place
                    self.ends[server.url] = nccl_sending_end(server.url, self.address, port, workers, self.timeout)
                end = self.ends[server.url]
                end.source = WeightSource(state, dtype)
                end.send_weights()
            except (ServerGone, OSError, RuntimeError) as error:  # requests' errors are OSErrors, NCCL's RuntimeErrors
                self.ends.pop(server.url, None)
                failed[server.url] = f"NCCL weight transfer: {error}"
        return failed


async def _update(server: Server, info: dict[str, Any], timeout: float) -> None:
    await server.update(info, timeout)


def make_sender(recipe: Recipe, policy: Policy, pool: Pool, folder: Path) -> Sender:
    """The sender that ``rollout.vllm_weight_transfer`` names."""
    rollout, timeout = recipe.rollout, recipe.rollout.vllm_sync_timeout
    way = rollout.vllm_weight_transfer
    if way == "auto":
        way = "path" if policy.device.type != "cuda" else "ipc" if rollout.vllm_mode == "colocate" else "nccl"
    if way == "path":
        return PathSender(pool, folder, timeout)
    if policy.device.type != "cuda":
        raise UserError(f"rollout.vllm_weight_transfer: {way} needs GPUs; path works without")
    if way == "nccl":
        return NcclSender(pool, socket.gethostbyname(socket.gethostname()), rollout.vllm_group_port, timeout)
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
