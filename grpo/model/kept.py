"""Tensors that a model holds in another type than the rest, on purpose: a router's bias, decays, buffers of a file.

A policy reads them as ``from_pretrained`` does. A copy in bfloat16 that rounded them would be another model.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept(shell: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """Names of the tensors that stay as they are when the rest of a model gets ``dtype``, which ``shell`` was made in.

    They are those that the model names itself (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``) or makes
    in a type of their own, and all buffers. transformers heeds the first list in float16 alone, and not all models
    could multiply by such a weight in bfloat16: of that list a linear layer's are not kept.
    """
    state = shell.state_dict(keep_vars=True)
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    found = {name for name, t in floating.items() if t.dtype != dtype or not isinstance(t, nn.Parameter)}
    always, by_name = (_pattern(names) for names in (shell._keep_in_fp32_modules_strict, shell._keep_in_fp32_modules))
    linear = {f"{name}.weight" for name, module in shell.named_modules() if isinstance(module, nn.Linear)}
    found |= {name for name in floating if always.search(name)}
    return found | {name for name in floating if by_name.search(name) and name not in linear}


def set_types(shell: nn.Module, types: dict[str, torch.dtype]) -> None:
    """Give tensors of a model without weights these types, by name."""
    for name, dtype in types.items():
        owner, _, last = name.rpartition(".")
        module = shell.get_submodule(owner)
        if (parameter := module._parameters.get(last)) is not None:
            parameter.data = parameter.data.to(dtype)
        elif (buffer := module._buffers.get(last)) is not None:
            module._buffers[last] = buffer.to(dtype)


def _pattern(names: set[str] | list[str] | None) -> re.Pattern[str]:
    """What matches names as ``from_pretrained`` does."""
    return re.compile("|".join(name.replace("*", ".*") for name in names or []) or r"(?!)")
