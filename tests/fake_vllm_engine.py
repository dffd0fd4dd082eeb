"""A fake of a vLLM engine that holds weights: transformers computes, grpo's own ``WorkerExtension`` loads and looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.fake_vllm import GENERATE, Answer, Body, FakeServer

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch.accelerator, "is_available", lambda: True)  # worker.py would replace torch's generators
    from grpo.backends.vllm.worker import WorkerExtension


class FakeWorker(WorkerExtension):
    def __init__(self, causal_lm: Any):
        self.model_runner = SimpleNamespace(get_model=lambda: causal_lm)
        self.causal_lm = causal_lm

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.causal_lm.load_state_dict(dict(weights_iterator), strict=False)


class FakeEngine(FakeServer):
    """NOT vLLM: samples one token after the other from a transformers model that was made of ``folder``.

    ``settings`` is what it says of itself. ``start_again`` is what a server does that died: other weights, no label.
    Adapters are kept by name and change nothing of what is sampled.
    """

    def __init__(self, folder: Path, length: int = 512):
        super().__init__(label="default")
        self.folder = folder
        self.settings: dict[str, Any] = {
            "model_config": {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": length},
            "lora_config": {"max_lora_rank": 8},
            "parallel_config": {"worker_extension_cls": "grpo.backends.vllm.worker.WorkerExtension"},
        }
        self.routes |= {
            "/version": lambda body: {"version": "0.32.0"},
            "/server_info": lambda body: {"vllm_config": self.settings},
            "/collective_rpc": self.on_workers,
            "/update_weight_version": self.take_label,
            "/reset_prefix_cache": lambda body: {"success": True},
            "/v1/load_lora_adapter": self.load_adapter,
            "/v1/unload_lora_adapter": self.unload_adapter,
        }
        self.adapters: dict[str, Path] = {}
        self.load_other_weights()

    def load_other_weights(self) -> None:
        causal_lm = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in causal_lm.parameters():
                parameter.mul_(0.5)
        self.worker = FakeWorker(causal_lm)

    def start_again(self) -> None:
        self.die()
        self.label = "default"
        self.adapters = {}
        self.load_other_weights()
        self.start()

    def load_adapter(self, body: Body) -> Answer:
        name = body["lora_name"]
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        self.adapters[name] = Path(body["lora_path"])
        return "Success"

    def unload_adapter(self, body: Body) -> Answer:
        if self.adapters.pop(body["lora_name"], None) is None:
            return 404, {"error": {"message": "The lora adapter cannot be found."}}
        return "Success"

    def adapter_fingerprint(self) -> dict[str, Any]:
        """Of the one loaded last, as ``WorkerExtension`` finds it in vLLM's layers: B multiplied by the scale."""
        folder = list(self.adapters.values())[-1]
        config = json.loads((folder / "adapter_config.json").read_text())
        found: dict[str, Any] = {}
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            layer, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
            entry = found.setdefault(layer, {"parts": [layer]})
            scale = config["lora_alpha"] / config["r"] if rest[0] == "B" else 1.0
            entry[rest[0].lower()] = float((tensor * scale).double().square().sum())
        return found

    def on_workers(self, body: Body) -> Answer:
        if body["method"] == "grpo_adapter_fingerprint":
            return {"results": [self.adapter_fingerprint()]}
        return {"results": [getattr(self.worker, body["method"])(*body["args"])]}

    def take_label(self, body: Body) -> Answer:
        self.label = body["new_version"]
        return {"success": True}

    @torch.no_grad()
    def completion(self, body: Body) -> Answer:
        asked = body["sampling_params"]
        generator = torch.Generator().manual_seed(asked["seed"])
        token_ids: list[int] = []
        logprobs: list[float] = []
        finish_reason = "length"
        cache, new = None, body["token_ids"]
        while len(token_ids) < asked["max_tokens"]:
            out = self.worker.causal_lm(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            logps = (out.logits[0, -1].float() / asked["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(logps.exp(), 1, generator=generator))
            cache, new = out.past_key_values, [token]
            token_ids.append(token)
            logprobs.append(float(logps[token]))
            if token in asked["stop_token_ids"]:
                finish_reason = "stop"
                break
        choice = {
            "token_ids": token_ids,
            "logprobs": {"content": [{"logprob": logprob} for logprob in logprobs]},
            "finish_reason": finish_reason,
            "weight_versions": [{"start": 0, "end": len(token_ids), "version": self.label}],
        }
        return {"model": body.get("model", "base"), "choices": [choice]}


__all__ = ["GENERATE", "FakeEngine"]
