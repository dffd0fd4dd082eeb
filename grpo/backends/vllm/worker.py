"""What the trainer adds to vLLM's workers: they load weights from a file, and say which weights they hold.

vLLM mixes ``WorkerExtension`` into its worker class (``--worker-extension-cls``); methods are called by name through
``collective_rpc``. Nothing of grpo is imported here: this runs in vLLM's processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PACKED_COLUMNS = 256  # columns of a packed layer that are read back, at most


class _CpuGenerator(torch.Generator):
    """A generator that takes an offset and ignores it.

    vLLM 0.32 resets a request's generator to an earlier offset when it throws away a token that was drawn too early.
    It does so when a prompt came in pieces, and when a request was preempted, as all are when weights arrive. CPU
    generators have no offset, and the engine would end. Ignoring the offset costs that request one draw.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


if not torch.accelerator.is_available():
    torch.Generator = _CpuGenerator  # type: ignore[misc]


class WorkerExtension:
    model_runner: Any  # the worker's
    model_config: Any
    reload_weights: Any

    def grpo_load(self, folder: str) -> None:
        """Replace all weights by those in ``folder``'s safetensors files, under the names of the checkpoint."""
        try:
            self.reload_weights(weights_iterator=_tensors(Path(folder)))
        except BaseException:
            self._forget_what_came()
            raise
        for layer in self.model_runner.get_model().modules():
            # vLLM 0.32 reloads the embedding and forgets the copy that a tied output head computes with on a CPU.
            if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
                layer.quant_method.process_weights_after_loading(layer)

    def _forget_what_came(self) -> None:
        """After a load that broke off. vLLM keeps what had come of a layer, and would mix it with the next load's."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model_runner.get_model(), self.model_config)

    def grpo_fingerprint(self) -> dict[str, Any]:
        """Sum and sum of squares, in float64, of every weight that the model computes with, by vLLM's names.

        Neither depends on the order of elements, so fused, padded or transposed layouts do not matter. ``parts`` are
        the checkpoint's tensors that vLLM fused into this one, ``dtype`` is the type that it is held in. With
        ``stride`` n, every n-th column was read.
        """
        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", None) or {}
        found = {}
        with torch.no_grad():
            for name, layer in model.named_modules():
                for kind, parameter in layer.named_parameters(prefix=name, recurse=False):
                    tensor, stride = parameter.detach(), 1
                    if kind.endswith(".weight") and hasattr(layer, "cpu_linear"):
                        tensor, stride = _read_back(layer)
                    if indices := getattr(layer, "shard_indices", None):  # a vocabulary padded to a round number
                        tensor = tensor[: indices.num_org_elements]
                    found[kind] = {
                        "parts": _parts(kind.replace(".base_layer.", "."), fused),
                        "stride": stride,
                        "dtype": str(tensor.dtype).removeprefix("torch."),
                        "sum": float(tensor.sum(dtype=torch.float64)),
                        "squares": float(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2),
                    }
        return found

    def grpo_adapter_fingerprint(self) -> dict[str, Any]:
        """Sums of squares of both matrices of each layer, of the LoRA adapter loaded last. B includes the scale."""
        manager = self.model_runner.lora_manager._adapter_manager
        adapters = manager.list_adapters()
        fused = getattr(self.model_runner.get_model(), "packed_modules_mapping", None) or {}
        found = {}
        for name, layer in adapters[max(adapters)].loras.items():
            found[name] = {"parts": _parts(name, fused), "a": _squares(layer.lora_a), "b": _squares(layer.lora_b)}
        return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no .safetensors file in {folder} of the server's machine. Either rollout.vllm_sync_dir is a folder that "
            "trainer and server both see, or rollout.vllm_weight_transfer is http"
        )
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                yield name, opened.get_tensor(name)


def _parts(name: str, fused: dict[str, list[str]]) -> list[str]:
    """The checkpoint's names for a parameter of vLLM's: the names of the layers it fused, or its own."""
    segments = name.split(".")
    for place, segment in enumerate(segments):
        if segment in fused:
            return [".".join([*segments[:place], part, *segments[place + 1 :]]) for part in fused[segment]]
    return [name]


def _squares(tensors: Any) -> float:
    """Sum of squares of a tensor, or of a fused layer's tensors, some of which may be None."""
    tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(float(torch.linalg.vector_norm(t, dtype=torch.float64) ** 2) for t in tensors if t is not None)


def _read_back(layer: Any) -> tuple[torch.Tensor, int]:
    """Columns of a linear layer's weight, and every how many-th they are.

    A CPU kernel keeps the weight in a layout of its own, so the columns are the layer's answers to unit vectors. They
    are exact in every type, because all but one product of each sum are zero.
    """
    width = layer.weight.shape[-1] if layer.weight.numel() else layer.input_size_per_partition
    stride = -(-width // PACKED_COLUMNS)
    picked = torch.arange(0, width, stride)
    units = torch.zeros(len(picked), width, dtype=layer.params_dtype)
    units[torch.arange(len(picked)), picked] = 1
    return layer.quant_method.apply(layer, units, bias=None), stride
