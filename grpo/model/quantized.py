"""QLoRA (arXiv:2305.14314): a base whose linear layers hold 4-bit weights, under adapters that are trained in float32.

bitsandbytes holds the weights (NF4 in blocks of 64, their scales in 8 bits) and computes with them: in a product each
is the number of the compute type that its code stands for. Those numbers are what ``dequantized`` gives, so an engine
that holds them computes as the trainer does, and only adapters have to travel to it after the first time.
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


def dequantized(causal_lm: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's ``state`` with the weights of 4-bit layers as numbers of the compute type, and without what else these
    layers hold."""
    state = dict(state)
    for name, layer in _layers(causal_lm):
        for key in [key for key in state if key.startswith(f"{name}.weight.")]:
            del state[key]
        state[f"{name}.weight"] = _dequantized(layer)
    return state


def _dequantized(layer: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit

    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit))
