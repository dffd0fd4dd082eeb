"""Where a model's weights are: nowhere yet (the meta device), whole on a device, or in shards on all processes."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, init_empty_weights
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from grpo.errors import RunError, UserError
from grpo.model.kept import set_types

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def shell(config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, **keywords: Any) -> PreTrainedModel:
    """A causal LM of this shape, its weights on the meta device: they take no memory and no time. Buffers, such as the
    frequencies of rotary embeddings, are computed: no file holds them. ``config`` is not changed; what it says of a
    file's quantization does not hold of the shell."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **keywords)
    model.tie_weights()
    return model


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give weights on the meta device memory on ``device``, with arbitrary content; what has a content moves there.
    Tied weights stay tied."""
    if any(isinstance(p, DTensor) for p in model.parameters()):
        buffers = {name: buffer.to(device) for name, buffer in model.named_buffers()}
        model.to_empty(device=device)  # FSDP2 then takes up the new shards
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        return
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and p.is_meta and id(p) not in made:
                made[id(p)] = nn.Parameter(torch.empty_like(p, device=device), requires_grad=p.requires_grad)
    kept = list(model.parameters())  # or an address could be given away again
    for module in model.modules():
        module._parameters.update({n: made[id(p)] for n, p in module._parameters.items() if id(p) in made})
    del kept
    model.to(device)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the launch shards weights (FSDP2)."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard a model as the launch's FSDP2 settings say. It stays on its device, the meta device too. Raises UserError
    where they name a layer that it does not have."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # torch 2.13 warns of log-probabilities that are views. Nothing is done in place to them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plugin = accelerator.state.fsdp_plugin
    plugin.cpu_ram_efficient_loading = False  # accelerate's own way of filling shells needs the whole float32 model
    try:
        return fsdp2_prepare_model(accelerator, model)
    except ValueError as error:
        raise UserError(f"the launch's fsdp_config does not fit this model: {error}") from error


@torch.no_grad()
def fill(model: nn.Module, source: nn.Module | None, *, several: bool) -> None:
    """Copy what the first process's ``source`` holds (None elsewhere) into every process's ``model``, whole or sharded.
    Called by all processes, if there are several."""
    targets = {names[0]: tensor for names, tensor in with_ties(model)}
    given = {names[0]: tensor for names, tensor in with_ties(source)} if source is not None else {}
    types = _same_everywhere({name: tensor.dtype for name, tensor in given.items()})
    for name, dtype in types.items():
        target = targets[name]
        whole = given[name] if given else torch.empty(target.shape, dtype=dtype, device=target.device)
        if several:
            whole = whole.to(target.device).contiguous()
            torch.distributed.broadcast(whole, src=0)
        assign(target, whole)


def match(model: nn.Module, source: nn.Module | None, dtype: torch.dtype) -> None:
    """Give a shell's tensors the types of the first process's ``source``, if ``dtype`` is not float32: some models keep
    a few of their layers in float32 then. Called by all processes.

    Raises:
        RunError: the two models are not of the same shape.
    """
    mine = {names[0]: tensor for names, tensor in with_ties(model)}
    given = {names[0]: tensor for names, tensor in with_ties(source)} if source is not None else {}
    spec = _same_everywhere({name: (tensor.shape, tensor.dtype) for name, tensor in given.items()})
    shapes = {(name, shape) for name, (shape, _) in spec.items()} ^ {(name, t.shape) for name, t in mine.items()}
    if shapes:
        names = ", ".join(sorted({name for name, _ in shapes})[:3])
        raise RunError(f"the weights that were read are not those of the model that config.json describes: see {names}")
    if dtype != torch.float32:
        set_types(model, {name: stored for name, (_, stored) in spec.items()})


def _same_everywhere(facts: dict[str, Any]) -> dict[str, Any]:
    sent = [facts]
    broadcast_object_list(sent)
    return sent[0]


@torch.no_grad()
def assign(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy ``whole``, which every process has, into ``target``, which may be sharded."""
    local(target).copy_(local(sharded_like(whole, target)))


def sharded_like(whole: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``whole``, which every process has, on the target's device and sharded as the target is, if it is not already.
    Nothing is sent."""
    whole = whole.to(target.device)
    if not isinstance(target, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def cut_as(target: DTensor, part: torch.Tensor) -> DTensor:
    """A tensor of which each process has ``part``, as many rows as it has of ``target``. The part stays where it is:
    ``from_local`` would move it to the mesh's device, and page-locked memory would be lost."""
    shape = torch.Size((target.shape[0], *part.shape[1:]))
    given = {"run_check": False, "shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    spec = DTensor.from_local(part.to("meta"), target.device_mesh, target.placements, **given)._spec
    return DTensor(part, spec, requires_grad=False)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor's part on this process, which shares its memory; another tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor, gathered where it is sharded, in ``dtype``. It is cast before it travels."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def with_ties(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """What ``state_dict`` holds, each tensor once with all of its names, in the order of the first ones."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(found.values())
