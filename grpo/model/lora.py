"""LoRA adapters (arXiv:2106.09685): added to a model, and removed from or merged into a copy of its state."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from grpo.config import LoraConfig
from grpo.errors import UserError
from grpo.model.quantized import whole_shape, without_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel


TRIED = 0.02  # standard deviation of an adapter's numbers where a check would find zeros
_PRODUCT = re.compile(r"lora_(embedding_)?[AB]\.\w+(\.weight)?$")  # of an adapter that adds scaling * B A, and no more


def add_adapters(causal_lm: PreTrainedModel, lora: LoraConfig) -> Any:
    """The model with LoRA adapters (arXiv:2106.09685), trained in float32; returns peft's PeftModel.

    Raises:
        UserError: there is nothing of these names to adapt, or adapters on it could not be merged again.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    before = {name: whole_shape(tensor) for name, tensor in _state(causal_lm).items()}
    peft_config = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=_routers(causal_lm) if lora.target_modules == "all-linear" else None,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # Of fused experts, whose rank and scale peft sets by a pattern, and heeds.
            warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys did not match")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # it is set as it must be
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # check_merge refuses
            peft_model = get_peft_model(causal_lm, peft_config)
    except ValueError as error:
        raise UserError(f"model.lora: {error}") from error
    check_merge(causal_lm, before)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


@torch.no_grad()
def check_merge(causal_lm: nn.Module, before: dict[str, torch.Size]) -> None:
    """Refuse adapters that the weights from ``before`` them, given by name and shape, could not take up. It is a run's
    end that merges them, and a sampler's copy.

    Raises:
        UserError: an adapter of another kind than is known here, or on a weight that two layers share.
    """
    state = _state(causal_lm)
    base, deltas = base_of(causal_lm, state), deltas_of(causal_lm, state, lambda tensor: tensor)
    trained = {name for name, tensor in base.items() if tensor.requires_grad}
    layers = _lora_layers(causal_lm).items()
    trained |= {_adapted(owner, layer) for owner, layer in layers if not all(map(_PRODUCT.match, _own(layer)))}
    if lost := (base.keys() ^ before.keys()) | trained | (deltas.keys() - base.keys()):
        raise UserError(f"model.lora: what peft adds to {min(lost)} can't be merged; take it out of target_modules")
    names_of: dict[int, list[str]] = {}
    for name, tensor in base.items():
        names_of.setdefault(id(tensor), []).append(name)
    for name in deltas:
        if others := [other for other in names_of[id(base[name])] if other != name]:
            raise UserError(
                f"model.lora.target_modules: {name} and {others[0]} are one weight (tied), and an adapter on one of "
                "the two can't be merged into it. Leave both out of target_modules"
            )
    alike = {(re.sub(r"\d+", "", name), before[name]): name for name in deltas}  # one of each kind is tried
    for name in alike.values():
        try:
            fits = deltas[name]().shape == before[name]
        except Exception as error:  # whatever peft says of a layer that it can't merge
            raise UserError(f"model.lora: an adapter on {name} can't be merged: {error}") from error
        if not fits:
            raise UserError(f"model.lora: an adapter on {name} can't be merged: it has another shape")


def _state(causal_lm: nn.Module) -> dict[str, torch.Tensor]:
    return without_scales(causal_lm.state_dict(keep_vars=True))


def base_of(causal_lm: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA model's ``state`` without its adapters, by the names from before they were added."""
    layers = _lora_layers(causal_lm)
    adapters = {f"{owner}.{name}" for owner, layer in layers.items() for name in _own(layer)}
    # A module of which two parameters have adapters is wrapped twice.
    wraps = sorted((f"{owner}.base_layer." for owner in layers), key=len, reverse=True)
    base = {}
    for name, tensor in state.items():
        if name in adapters:
            continue
        for wrap in wraps if ".base_layer." in name else ():
            if name.startswith(wrap):
                name = wrap.removesuffix("base_layer.") + name.removeprefix(wrap)
        base[name] = tensor
    return base


def deltas_of(
    causal_lm: nn.Module, state: dict[str, torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Callable[[], torch.Tensor]]:
    """For each weight with an adapter, by its name without: how to compute what the adapter adds, scaling * B A.
    ``gather`` makes a tensor of ``state`` whole."""

    def delta(owner: str, layer: Any) -> torch.Tensor:
        # The layer's own parameters may be sharded.
        own = {f"layer.{name}": gather(state[f"{owner}.{name}"]) for name in _own(layer)}
        return functional_call(_Delta(layer), own)

    return {_adapted(owner, layer): partial(delta, owner, layer) for owner, layer in _lora_layers(causal_lm).items()}


def wraps_parameter(module: nn.Module) -> bool:
    """Whether a module of peft's adds to a parameter of the module beneath it, such as fused experts."""
    return hasattr(module, "parameter_name")


def _adapted(owner: str, layer: Any) -> str:
    """The name, from before adapters, of the weight that a layer of peft's adds to."""
    return f"{owner.replace('.base_layer', '')}.{layer.parameter_name if wraps_parameter(layer) else 'weight'}"


def _own(layer: Any) -> list[str]:
    """Names of a layer's tensors that are the adapter's."""
    names = (name for name, _ in chain(layer.named_parameters(), layer.named_buffers()))
    return [name for name in names if not name.startswith("base_layer.")]


class _Delta(nn.Module):
    """What an adapter adds to its layer's weight."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(self) -> torch.Tensor:
        return self.layer.get_delta_weight(self.layer.active_adapters[0])


@contextmanager
def without_adapters(peft_model: Any) -> Iterator[None]:
    """Within it, passes without gradients are those of the base."""
    asked_for = {p: p.requires_grad for p in peft_model.parameters()}
    trained = [p for p, wanted in asked_for.items() if wanted]
    try:
        with peft_model.disable_adapter():
            # peft freezes them meanwhile. FSDP2 asks once, at the first pass, which of its weights are trained.
            for parameter in trained:
                parameter.requires_grad_(True)
            yield
    finally:  # peft trains all adapters again, also those that no text reaches
        for parameter, wanted in asked_for.items():
            parameter.requires_grad_(wanted)


@contextmanager
@torch.no_grad()
def as_if_trained(causal_lm: nn.Module) -> Iterator[None]:
    """Within it, adapters add something to what they adapt. New ones add nothing, so a check of a model with them would
    see nothing of how a pass computes them. Of a model without adapters, nothing changes."""
    random = torch.Generator().manual_seed(0)
    zeros = []
    for layer in _lora_layers(causal_lm).values():
        for name in filter(_PRODUCT.match, _own(layer)):
            if not (parameter := layer.get_parameter(name)).any():
                zeros.append(parameter)
                parameter.copy_(TRIED * torch.randn(parameter.shape, generator=random))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _lora_layers(causal_lm: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)}


def _routers(causal_lm: nn.Module) -> list[str] | None:
    """Routers that are linear layers by their class and give more than a product (Llama 4's, PhiMoE's). peft would take
    them for linear ones, and fail in the first pass."""
    linear = (name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear) and _routes(module))
    return list(linear) or None


def _routes(module: nn.Module) -> bool:
    return "Router" in type(module).__name__ and type(module).forward is not nn.Linear.forward
