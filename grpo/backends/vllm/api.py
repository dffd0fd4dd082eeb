"""vLLM's HTTP interface. Only this file knows its routes and their answers.

| used                                                  | for                                          |
|-------------------------------------------------------|----------------------------------------------|
| GET /health, /version, /server_info                   | is it up, which vLLM, with which settings    |
| POST /inference/v1/generate (--enable-scale-out)      | tokens in, tokens out, with logprobs and the |
|                                                       | weight version that sampled each token       |
| POST /pause?mode=keep, /resume                        | hold requests while weights change           |
| POST /collective_rpc (worker.WorkerExtension)         | load from a file, fingerprint                |
| POST /update_weight_version                           | label the weights                            |
| POST /init_weight_transfer_engine,                    | weights over NCCL or CUDA IPC                |
|      /start_, /update_, /finish_weight_update         |                                              |
| POST /reset_prefix_cache                              | forget keys and values of old weights        |
| POST /sleep?level=&mode=wait, /wake_up?tags=          | give up and take back GPU memory             |
| POST /v1/load_lora_adapter, /v1/unload_lora_adapter   | adapter-only sync                            |
| POST /v1/completions (prompt_logprobs), /detokenize,  | a teacher's: what it says of a text, its     |
|      GET /v1/models                                   | tokenizer, its name                          |
| --worker-extension-cls, --logprobs-mode, --uds,       | see serve.py, process.py                     |
|   --generation-config, --weight-transfer-config       |                                              |
| vllm.distributed.weight_transfer (trainer's side)     | the sending end of NCCL                      |

docs/backends.md says which versions were looked at, and how. The range is in ``serve.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import aiohttp
import torch

from grpo.backends.vllm import serve
from grpo.backends.vllm.upload import ROUTE
from grpo.errors import BackendFailed

HEALTH = 5.0  # seconds for a server to say that it is up
QUICK = 20.0  # seconds for a request that a healthy server answers at once
UPLOADED_AT_ONCE = 1 << 22  # bytes
UNIX = "unix:"  # what the URL of a Unix socket begins with
UNLABELLED = "default"  # a server's weight version before anybody has sent it weights


class ServerGone(Exception):
    """A server cannot be reached, broke off, or passed a deadline. It may come back."""


class Server:
    """One engine over HTTP. Methods are coroutines of the pool's loop.

    ``url`` is ``http://HOST:PORT``, or ``unix:PATH`` for a socket of this machine. Methods raise ServerGone where
    trying later may help, and BackendFailed where the server has refused.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url = url
        self.session = session
        self.base = "http://localhost" if url.startswith(UNIX) else url  # the session knows the socket

    async def check_health(self) -> None:
        await self._call("GET", "/health", timeout=HEALTH)

    async def version(self) -> str:
        return (await self._call("GET", "/version", timeout=QUICK))["version"]

    async def settings(self) -> dict[str, Any]:
        """vLLM's whole configuration, by section (``model_config``, ``cache_config``, …)."""
        return (await self._call("GET", "/server_info?config_format=json", timeout=QUICK))["vllm_config"]

    async def generate(self, payload: dict[str, Any], timeout: float) -> dict[str, Any]:
        """One completion: ``token_ids``, ``logprobs``, ``finish_reason``, ``weight_versions``, ``model`` (the
        adapter's name, where the request named one)."""
        unknown_adapter = 404 if "model" in payload else None  # the server was started again, without it
        answer = await self._call("POST", "/inference/v1/generate", payload, timeout=timeout, gone=unknown_adapter)
        choice = answer["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerGone(f"a request ended with {choice['finish_reason']!r}")
        return choice | {"model": answer["model"]}

    async def pause(self, timeout: float) -> None:
        """Stop between two tokens. Requests in flight are kept, new ones are queued."""
        await self._call("POST", "/pause?mode=keep&clear_cache=false", timeout=timeout)

    async def resume(self) -> None:
        await self._call("POST", "/resume", timeout=QUICK)

    async def label(self, version: int) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": str(version)}, timeout=QUICK)

    async def forget_prefixes(self) -> None:
        """Drop cached keys and values, which are then computed again; also those of requests in flight."""
        path = "/reset_prefix_cache?reset_running_requests=true"
        if not (await self._call("POST", path, timeout=QUICK))["success"]:
            raise BackendFailed(
                f"vllm server {self.url} did not reset its prefix cache: old keys and values would be used"
            )

    async def sleep(self, level: int, timeout: float) -> None:
        """Give up GPU memory. At level 1 the weights wait in the host's memory, at level 2 they are gone: vLLM keeps
        the model's buffers alone (rotary tables)."""
        await self._call("POST", f"/sleep?level={level}&mode=wait", timeout=timeout)

    async def wake_weights(self, timeout: float) -> None:
        """Take memory for the weights back. Nothing is sampled before ``wake_cache``."""
        await self._call("POST", "/wake_up?tags=weights", timeout=timeout)

    async def wake_cache(self, timeout: float) -> None:
        """Take memory for keys and values back, and go on sampling."""
        await self._call("POST", "/wake_up?tags=kv_cache", timeout=timeout)

    async def load(self, folder: str, timeout: float) -> None:
        """Load weights from a folder that the server sees too."""
        await self.on_workers("grpo_load", folder, timeout=timeout)

    async def upload(self, folder: Path, timeout: float) -> str:
        """Send a folder's files to the server's machine. Returns the folder there. One of the same name is replaced."""
        await self.forget_upload(folder.name)
        there = ""
        for file in sorted(folder.iterdir()):
            path = f"{ROUTE}{folder.name}/{file.name}"
            there = (await self._call("POST", path, data=_chunks(file), timeout=timeout))["folder"]
        return there

    async def forget_upload(self, name: str) -> None:
        await self._call("DELETE", f"{ROUTE}{name}", timeout=QUICK)

    async def fingerprint(self, timeout: float) -> list[dict[str, Any]]:
        """One ``WorkerExtension.grpo_fingerprint`` for each worker."""
        return await self.on_workers("grpo_fingerprint", timeout=timeout)

    async def adapter_fingerprint(self, timeout: float) -> list[dict[str, Any]]:
        return await self.on_workers("grpo_adapter_fingerprint", timeout=timeout)

    async def on_workers(self, method: str, *args: str, timeout: float) -> list[Any]:
        body = {"method": method, "args": list(args)}
        return (await self._call("POST", "/collective_rpc", body, timeout=timeout))["results"]

    async def load_adapter(self, name: str, folder: str, timeout: float) -> None:
        body = {"lora_name": name, "lora_path": folder}
        await self._call("POST", "/v1/load_lora_adapter", body, timeout=timeout)

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, if there is one of that name."""
        await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=QUICK, fine=404)

    async def models(self) -> list[dict[str, Any]]:
        """What it serves: ``id``, ``root`` (where that came from) and ``max_model_len`` of each."""
        return (await self._call("GET", "/v1/models", timeout=QUICK))["data"]

    async def detokenize(self, model: str, token_ids: list[int], timeout: float) -> str:
        """The text of tokens, special ones included."""
        body = {"model": model, "tokens": token_ids}
        return (await self._call("POST", "/detokenize", body, timeout=timeout))["prompt"]

    async def prompt_logprobs(
        self, model: str, token_ids: list[int], *, top_k: int, timeout: float
    ) -> list[dict[str, dict[str, Any]]]:
        """For each token of a text, by id as text, ``logprob`` and ``rank`` of the token itself and of the ``top_k``
        likeliest, given those before it. Of the first, before which there is nothing, none."""
        body = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        answer = await self._call("POST", "/v1/completions", body, timeout=timeout)
        return [of_token or {} for of_token in answer["choices"][0]["prompt_logprobs"]]

    async def start_update(self, timeout: float) -> None:
        await self._call("POST", "/start_weight_update", timeout=timeout)

    async def init_transfer(self, init_info: dict[str, Any], timeout: float) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info}, timeout=timeout)

    async def update(self, update_info: dict[str, Any], timeout: float) -> None:
        await self._call("POST", "/update_weights", {"update_info": update_info}, timeout=timeout)

    async def finish_update(self, timeout: float) -> None:
        await self._call("POST", "/finish_weight_update", {}, timeout=timeout)

    async def abandon_update(self, timeout: float) -> None:
        """End an update that broke off. What weights the server then holds is not known.

        While one is active, vLLM answers 500 to the start of the next. After one that failed in the engine none is
        active, but what had come of it waits in the layers and would be mixed with the next one's; only the end of an
        update clears that away, so one is started for it.
        """
        with contextlib.suppress(ServerGone):  # one is active
            await self.start_update(timeout)
        await self.finish_update(timeout)

    async def _call(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        data: AsyncIterator[bytes] | None = None,
        timeout: float,
        gone: int | None = None,
        fine: int | None = None,
    ) -> Any:
        """The decoded answer. ``body`` is sent as JSON, ``data`` as it is.

        ``timeout`` counts seconds from sending to the last byte. The status ``gone`` raises ServerGone, as those from
        500 on do. The status ``fine`` is no error.
        """
        route = f"{verb} {path.split('?')[0]}"
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self.session.request(verb, self.base + path, json=body, data=data, timeout=limit) as response:
                text = await response.text()
                status = response.status
        except asyncio.TimeoutError:
            raise ServerGone(f"no answer to {route} within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerGone(f"{route}: {error or type(error).__name__}") from None
        if status >= 500 or status == gone:
            raise ServerGone(f"{route} answered {status}: {_message(text)}")
        if status >= 400 and status != fine:
            raise BackendFailed(f"vllm server {self.url} refused {route} ({status}): {_message(text)}{_advice(status)}")
        return json.loads(text) if text.startswith(("{", "[")) else text


async def _chunks(file: Path) -> AsyncIterator[bytes]:
    with file.open("rb") as opened:
        while chunk := await asyncio.to_thread(opened.read, UPLOADED_AT_ONCE):
            yield chunk


def _message(text: str) -> str:
    try:
        error = json.loads(text)
        error = error.get("error", error.get("detail", error))
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (json.JSONDecodeError, AttributeError):
        return text.strip()[:500] or "no message"


def _advice(status: int) -> str:
    missing = ". Start the server with launch/vllm_serve.sh, which opens the routes that training needs"
    return missing if status in (403, 404) else ""


class _Declared(list[Any]):
    """vLLM 0.32 calls ``metadata``, 0.33 reads it."""

    def __call__(self) -> list[Any]:
        return self


class WeightSource:
    """A state in the form that vLLM's sending end wants: names and shapes first, then tensors, cast one by one.

    vLLM 0.32 iterates over a source; 0.33 asks it for ``iter_full``.
    """

    def __init__(self, state: dict[str, torch.Tensor], dtype: torch.dtype):
        self.state, self.dtype = state, dtype

    @cached_property
    def metadata(self) -> _Declared:
        from vllm.distributed.weight_transfer.base import ParamMeta

        types = types_of(self.state, self.dtype)
        return _Declared(ParamMeta(name, types[name], tuple(tensor.shape)) for name, tensor in self.state.items())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return cast(self.state, self.dtype)

    def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self)

    def implements_iter_full(self) -> bool:
        return True


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the engine's type, one at a time, but for what the model keeps in its own."""
    types = types_of(state, dtype)
    for name, tensor in state.items():
        yield name, tensor.detach().to(types[name])


def types_of(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is sent as. A state that comes in the engine's type has in float32 what the model holds so on
    purpose (``policy.kept``); a state in float32 throughout is cast."""
    mixed = dtype != torch.float32 and any(tensor.dtype == dtype for tensor in state.values())
    return {name: tensor.dtype if mixed and tensor.dtype == torch.float32 else dtype for name, tensor in state.items()}


def why_no_nccl() -> str | None:
    """What keeps this process from being the sending end of NCCL; None where nothing does.

    The import is tried, because it takes CUDA's libraries too.
    """
    version = serve.installed_version()
    if version is None:
        return "vLLM is not installed beside the trainer"
    if not serve.supported(version):
        return f"vLLM {version} is installed beside the trainer, and grpo supports vllm{serve.RANGE}"
    if serve.for_cpus():
        return f"the vLLM beside the trainer ({version}) is its CPU build"
    try:
        import requests  # noqa: F401  (vLLM's client imports it when it is used)
        import vllm.distributed.weight_transfer.clients
        import vllm.distributed.weight_transfer.nccl_engine  # noqa: F401
    except Exception as error:  # whatever an import of that size may raise
        return f"vLLM {version} cannot be imported beside the trainer ({error or type(error).__name__})"
    return None


def nccl_sending_end(url: str, address: str, port: int, workers: int, timeout: float) -> Any:
    """vLLM's sending end of a weight transfer, in a group with the server's workers. Needs vLLM in this process."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + workers, rank=0)
    client = HTTPVLLMWeightSyncClient(url, timeout=timeout)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=WeightSource({}, torch.bfloat16))
