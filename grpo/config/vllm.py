"""The rollout's vLLM settings, flat in `rollout` under TRL's names (`vllm_server_base_url`, …); docs/backends.md."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from grpo.config.base import LocalPath, NonEmpty, Positive, PositiveInt, Problem, Section


class VllmOptions(Section):
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """`colocate` starts an engine beside the training processes, on their devices; `server` uses engines that
    `launch/vllm_serve.sh` started elsewhere."""
    vllm_server_base_url: NonEmpty | list[NonEmpty] | None = None
    """With `vllm_mode: server`: the server's URL (`http://host:8000`), or several; requests are balanced over them."""
    vllm_server_timeout: Positive = 240.0
    """Seconds that a server may take to come up, and to come back after it was lost."""
    vllm_start_timeout: Positive = 900.0
    """With `colocate`: seconds that an engine may take from its start to its first answer. With an empty cache it
    compiles the model and captures graphs meanwhile, on several GPUs at once."""
    vllm_generation_timeout: Positive = 1800.0
    """Seconds that one completion, of an episode one turn, may take before its server counts as hung."""
    vllm_sync_timeout: Positive = 300.0
    """Seconds that handing over the weights may take before the server counts as hung."""
    vllm_weight_transfer: Literal["auto", "path", "http", "ipc", "nccl"] = "auto"
    """How weights travel: `path` as a file in memory or on a shared disk, `http` as a file sent to a server on another
    machine, `ipc` as handles of GPU memory (colocate), `nccl` broadcast between GPUs (server). `auto`: on GPUs `ipc` or
    `nccl`; where training runs on CPUs, or `nccl` lacks a vLLM beside the trainer, `path`, or `http` if a server is on
    another machine and there is no `vllm_sync_dir`."""
    vllm_sync_dir: NonEmpty | None = None
    """Folder that trainer and engine both see, for `path`; null is shared memory (/dev/shm)."""
    vllm_group_host: NonEmpty | None = None
    """The trainer's address for the NCCL group of `nccl`, as servers see it; null is the address of the interface that
    leads to the server."""
    vllm_group_port: PositiveInt = 51216
    """First port for the NCCL group of `nccl`; each further server takes the next."""
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """With `colocate`: share of the device's memory for the engine's weights and cache."""
    vllm_max_model_length: PositiveInt | None = None
    """With `colocate`: longest prompt and completion together; null is the sum of both limits of the recipe."""
    vllm_tensor_parallel_size: PositiveInt = 1
    """With `colocate`: processes whose devices share one engine."""
    vllm_enable_sleep_mode: bool | None = None
    """With `colocate` on a GPU: the engine gives up weights and cache while the update runs. null does so, but for
    rollouts that go on during the update."""
    vllm_dtype: Literal["float32", "bfloat16"] | None = None
    """Type that the engine computes in; null takes `model.dtype`."""
    vllm_lora_sync: Literal["merged", "adapter"] = "merged"
    """With `model.lora`: hand over merged weights, or the adapters alone (a server must run with --enable-lora). With
    `model.load_in_4bit` it is always the adapters alone."""
    vllm_probe_tolerance: Positive | None = None
    """Mean difference in nats that log-probabilities of engine and trainer may have over the probe of each sync; above
    it the run stops. null is 0.001 in float32 and 0.15 in bfloat16."""
    vllm_python: LocalPath | None = None
    """With `colocate`: the Python that vLLM is installed in; null is the one that trains."""
    vllm_args: list[str] = Field(default_factory=list)
    """With `colocate`: further arguments of `vllm serve`, such as `--max-num-seqs=256`."""

    def server_urls(self) -> list[str]:
        """The servers' URLs, without a slash at the end."""
        urls = self.vllm_server_base_url or []
        return [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]

    def vllm_problems(self, backend: str) -> list[Problem]:
        """What does not fit together."""
        # By value, not by what was written: the resolved recipe of a run names every key.
        options = VllmOptions.model_fields.items()
        given = [name for name, field in options if getattr(self, name) != field.get_default(call_default_factory=True)]
        if backend not in ("vllm", "auto"):
            return [
                Problem((name, "backend"), f"{name} is only used with backend: vllm or auto (backend is {backend})")
                for name in given
            ]
        return self._server_problems(given) if self.vllm_mode == "server" else self._colocate_problems(given)

    def _server_problems(self, given: list[str]) -> list[Problem]:
        own = ("gpu_memory_utilization", "max_model_length", "tensor_parallel_size", "enable_sleep_mode", "python")
        colocate_only = {f"vllm_{name}" for name in (*own, "args", "start_timeout")}
        text = "belongs to the server's own command line (launch/vllm_serve.sh), vllm_mode is server"
        problems = [Problem((name, "vllm_mode"), f"{name} {text}") for name in given if name in colocate_only]
        urls = self.server_urls()
        if not urls:
            text = "vllm_mode: server needs vllm_server_base_url, such as http://127.0.0.1:8000"
            problems.append(Problem(("vllm_mode", "vllm_server_base_url"), text))
        for url in urls:
            if not re.fullmatch(r"https?://[^/\s]+", url):
                text = f"vllm_server_base_url: {url} is not a server's URL, such as http://127.0.0.1:8000"
                problems.append(Problem(("vllm_server_base_url",), text))
        if len(set(urls)) < len(urls):
            problems.append(Problem(("vllm_server_base_url",), "vllm_server_base_url names a server twice"))
        if self.vllm_weight_transfer == "ipc":
            text = "vllm_weight_transfer: ipc shares memory of one GPU, so it needs vllm_mode: colocate"
            problems.append(Problem(("vllm_weight_transfer", "vllm_mode"), text))
        return problems

    def _colocate_problems(self, given: list[str]) -> list[Problem]:
        problems = [
            Problem((name, "vllm_mode"), f"{name} is only used with vllm_mode: server (vllm_mode is colocate)")
            for name in given
            if name in ("vllm_server_base_url", "vllm_group_host", "vllm_group_port")
        ]
        if self.vllm_weight_transfer == "http":
            text = "vllm_weight_transfer: http sends files to a server elsewhere, so vllm_mode: server"
            problems.append(Problem(("vllm_weight_transfer", "vllm_mode"), text))
        if self.vllm_weight_transfer == "nccl":
            text = "vllm_weight_transfer: nccl needs GPUs of the engine's own, so vllm_mode: server"
            problems.append(Problem(("vllm_weight_transfer", "vllm_mode"), text))
        return problems
