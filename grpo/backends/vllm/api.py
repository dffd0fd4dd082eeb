"""vLLM's HTTP interface. Only this file knows its routes and their answers.

| used                                                  | for                                         | since |
|-------------------------------------------------------|---------------------------------------------|-------|
| GET /health, /version, /server_info                   | is it up, which vLLM, with which settings    | 0.32  |
| POST /inference/v1/generate (--enable-scale-out)      | tokens in, tokens out, with logprobs and the | 0.32  |
|                                                       | weight version that sampled each token       |       |
| POST /pause?mode=keep, /resume                        | hold requests while weights change           | 0.32  |
| POST /collective_rpc (worker.WorkerExtension)         | load from a file, fingerprint                | 0.32  |
| POST /update_weight_version, GET /weight_info         | label the weights                            | 0.32  |
| POST /init_weight_transfer_engine,                    | weights over NCCL or CUDA IPC                | 0.32  |
|      /start_, /update_, /finish_weight_update         |                                              |       |
| POST /reset_prefix_cache                              | forget keys and values of old weights        | 0.32  |
| POST /sleep, /wake_up                                 | give up and take back GPU memory             | 0.32  |
| POST /v1/load_lora_adapter, /v1/unload_lora_adapter   | adapter-only sync                            | 0.32  |
| --worker-extension-cls, --logprobs-mode,              | see serve.py                                 | 0.32  |
|   --generation-config, --weight-transfer-config       |                                              |       |
| vllm.distributed.weight_transfer (trainer's side)     | the sending end of NCCL                      | 0.32  |

"Since" is the oldest version that grpo's tests ran against. An older one may have it too. The range is in ``serve.py``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import torch

from grpo.backends.base import Sampling
from grpo.errors import BackendFailed

HEALTH = 5.0  # seconds for a server to say that it is up
QUICK = 20.0  # seconds for a request that a healthy server answers at once
UNLABELLED = "default"  # a server's weight version before anybody has sent it weights


class ServerGone(Exception):
    """A server cannot be reached, broke off, or passed a deadline. It may come back."""


class Server:
    """One engine over HTTP. Methods are coroutines of the pool's loop.

    They raise ServerGone where trying later may help, and BackendFailed where the server has refused.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession):
        self.url = url
        self.session = session

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

    async def sleep(self, timeout: float) -> None:
        await self._call("POST", "/sleep?level=1&mode=wait", timeout=timeout)

    async def wake(self, timeout: float) -> None:
        await self._call("POST", "/wake_up", timeout=timeout)

    async def load(self, folder: str, timeout: float) -> None:
        """Load weights from a folder that the server sees too."""
        await self.on_workers("grpo_load", folder, timeout=timeout)

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

    async def start_update(self, timeout: float) -> None:
        await self._call("POST", "/start_weight_update", timeout=timeout)

    async def init_transfer(self, init_info: dict[str, Any], timeout: float) -> None:
        await self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info}, timeout=timeout)

    async def update(self, update_info: dict[str, Any], timeout: float) -> None:
        await self._call("POST", "/update_weights", {"update_info": update_info}, timeout=timeout)

    async def finish_update(self, timeout: float) -> None:
        await self._call("POST", "/finish_weight_update", {}, timeout=timeout)

    async def _call(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout: float,
        gone: int | None = None,
        fine: int | None = None,
    ) -> Any:
        """The decoded answer.

        ``timeout`` counts seconds from sending to the last byte. The status ``gone`` raises ServerGone, as those from
        500 on do. The status ``fine`` is no error.
        """
        route = f"{verb} {path.split('?')[0]}"
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self.session.request(verb, self.url + path, json=body, timeout=limit) as response:
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


def generate_payload(
    token_ids: list[int], key: int, sampling: Sampling, stop_token_ids: list[int], *, version: int, model: str | None
) -> dict[str, Any]:
    """The request for one completion, whose draws are seeded by its key alone.

    The salt keeps prompts from using cached keys and values of other weights. The trainer's own list says which ids
    end a completion; vLLM's end-of-sequence token is ignored.
    """
    return {
        "token_ids": token_ids,
        "cache_salt": f"v{version}",
        "sampling_params": {
            "max_tokens": sampling.max_completion_length,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "seed": key >> 1,  # vLLM's seeds are signed
            "logprobs": 0,
            "ignore_eos": True,
            "stop_token_ids": stop_token_ids,
            "stop": sampling.stop,
            "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),
            "skip_special_tokens": False,
        },
    } | ({"model": model} if model else {})


class WeightSource:
    """A state in the form that vLLM's sending end wants: names and shapes first, then tensors, cast one by one."""

    def __init__(self, state: dict[str, torch.Tensor], dtype: torch.dtype):
        self.state, self.dtype = state, dtype

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, self.dtype, tuple(tensor.shape)) for name, tensor in self.state.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return cast(self.state, self.dtype)


def cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the engine's type, one at a time."""
    for name, tensor in state.items():
        yield name, tensor.detach().to(dtype)


def nccl_sending_end(url: str, address: str, port: int, workers: int, timeout: float) -> Any:
    """vLLM's sending end of a weight transfer, in a group with the server's workers. Needs vLLM in this process."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=1 + workers, rank=0)
    client = HTTPVLLMWeightSyncClient(url, timeout=timeout)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=WeightSource({}, torch.bfloat16))
