"""QLoRA (arXiv:2305.14314): a base whose linear layers hold 4-bit weights, under adapters that are trained in float32.

bitsandbytes holds the weights (NF4 in blocks of 64, their scales in 8 bits) and computes with them: in a product each
is the number of the compute type that its code stands for (``numbers``). So an engine that holds those numbers computes
as the trainer does, and only adapters have to travel to it after the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.model.bitsandbytes import import_bitsandbytes

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def quantization_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What ``from_pretrained`` needs to know. Raises UserError where bitsandbytes is missing."""
    import_bitsandbytes("model.load_in_4bit")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def settle(causal_lm: PreTrainedModel) -> None:
    """Make a freshly quantized model one that trains and is copied as any other."""
    for _, layer in _layers(causal_lm):
        # On a CPU the first pass without gradients would round the scales and reorder the codes, for good.
        layer.support_avx512bf16_for_cpu = False
    # A copy made from this configuration is not quantized.
    del causal_lm.config.quantization_config


def is_quantized(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "quant_state", None) is not None


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    """What the codes of a 4-bit weight stand for, in the compute type; another tensor as it is."""
    if not is_quantized(tensor):
        return tensor.detach()
    from bitsandbytes.functional import dequantize_4bit

    quantized: Any = tensor
    return dequantize_4bit(quantized.data, quantized.quant_state)


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the numbers that a tensor stands for."""
    quantized: Any = tensor
    return torch.Size(quantized.quant_state.shape) if is_quantized(tensor) else tensor.shape


def without_scales(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's ``state_dict`` (of the parameters themselves) without what 4-bit weights hold besides their codes."""
    quantized = tuple(f"{name}." for name, tensor in state.items() if is_quantized(tensor))
    return {name: tensor for name, tensor in state.items() if not name.startswith(quantized)} if quantized else state


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit

    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))
