"""A worker whose weights a test can make wrong, and that takes CUDA IPC's updates without CUDA."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from grpo.backends.vllm.worker import WorkerExtension


class PerturbingWorkerExtension(WorkerExtension):
    def perturb(self, name: str, scale: str) -> None:
        """Multiply one parameter in place."""
        parameter = dict(self.model_runner.get_model().named_parameters())[name]
        parameter.data.mul_(float(scale))

    def half_loaded(self) -> list[str]:
        """Layers that keep what came of a load, for what comes next."""
        layers = self.model_runner.get_model().named_modules()
        return [name for name, layer in layers if get_layerwise_info(layer).can_load()]

    def lose_weights(self) -> None:
        """What sleep at level 2 does on a GPU: memory comes back with anything in it, buffers alone as they were."""
        for layer in self.model_runner.get_model().modules():
            for parameter in layer.parameters(recurse=False):
                parameter.data.fill_(0.5)
            if hasattr(layer, "cpu_linear"):  # it computes with a copy
                layer.quant_method.process_weights_after_loading(layer)


class IpcOfBytes(IPCWeightTransferEngine):
    """vLLM's own engine for CUDA IPC, but for this: a handle is the pickled tensor itself (``bytes_of``).

    Routes, their states and the reload of layers are vLLM's.
    """

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # without CUDA there is nothing to wait for

    def receive_weights(self, update_info: Any) -> None:
        tensors = [pickle.loads(handle["bytes"]) for handle in update_info.ipc_handles]
        self.model.load_weights(
            (name, torch.from_numpy(tensor)) for name, tensor in zip(update_info.names, tensors, strict=True)
        )


WeightTransferEngineFactory._registry["ipc"] = lambda: IpcOfBytes
