"""The update keeps half as much of each token for the backward pass: outputs of elementwise work are computed again.

Of a layer of a Llama, autograd keeps the input of each norm, its value before the weight and its output; q, k, v and
attention's output; and four tensors of the MLP's width: gate, act(gate), up and their product. Here norms and the
product of gated MLPs keep their inputs alone (``Recomputed``), and a layer that keeps their *output* as its own input
(q, k, v, gate, up, down, a LoRA adapter) keeps a note of how to make it again (``_pack``). In floats a token, H hidden,
K of keys, M of the MLP: 8 H + 2 K + 4 M become 4 H + 2 K + 2 M. The price is to compute each of them once more in a
backward pass, for all layers that need it. No matrix product is done again. Under autocast, the copy that each linear
layer casts for itself is not kept either.

The second pass calls what the first one called, on the same numbers, so gradients are the same, whatever the norm does.
An output is identified by its node in autograd's graph, not by its address: memory may be given to another tensor, and
a tensor that was overwritten has another node. Without gradients nothing is kept. On a CPU the usual norm and product
are compiled (``elementwise.py``), with and without gradients, so that both give the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from grpo.kernels import elementwise, liger

Compiled = elementwise.Norm | elementwise.Gated | liger.Norm | liger.Gated

COMPILED = elementwise.Norm, elementwise.Gated, liger.Norm, liger.Gated

NORMS = ("RMSNorm", "LayerNorm")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
GATED_MLP = (*PROJECTIONS, "act_fn")
SMALL = 16  # width of the layers with which an MLP is tried

# Private names of autograd that say where a kept tensor came from.
OF_A_TENSOR = ("_base", "_is_view", "_version")
OF_A_NODE = ("_input_metadata",)
OF_A_FUNCTION = ("_backward_cls",)
CAST = "ToCopyBackward0"  # the name of the node of a cast: autocast's, peft's

_watchers: list[Callable[[torch.Tensor], object]] = []


def missing() -> str | None:
    """The first private name that this file needs and this torch does not have."""
    x = torch.zeros(1, requires_grad=True)
    with torch.enable_grad():
        node: Any = x.to(torch.float64).grad_fn
    for kind, owner, names in (
        ("Tensor", x, OF_A_TENSOR), ("Node", node, OF_A_NODE), ("Function", Recomputed, OF_A_FUNCTION),
    ):  # fmt: skip
        for name in names:
            if not hasattr(owner, name):
                return f"{kind}.{name}"
    return None if node.name() == CAST else CAST


def install(causal_lm: Any, liger_on: torch.device | None = None) -> int:
    """Make the model's norms and gated MLPs keep less in training. Any other module stays as it is.

    A model with gradient checkpointing makes whole layers again, so it gains nothing but the faster code. Returns how
    many modules compute through Liger on the GPU ``liger_on``.
    """
    found = [(module, forward) for module in causal_lm.modules() if (forward := _lean_forward(module))]
    for module, forward in found:
        module.compiled = _compiled(module, liger_on)
        module.forward = MethodType(forward, module)
    if found and "forward" not in vars(causal_lm.base_model) and not causal_lm.is_gradient_checkpointing:
        causal_lm.base_model.forward = MethodType(_base_model_forward, causal_lm.base_model)
    return sum(isinstance(module.compiled, (liger.Norm, liger.Gated)) for module, _ in found)


@contextmanager
def watching(see: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """Within it, ``see`` is called with each tensor that the model keeps. Hooks set outside of the model are not."""
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)


def _lean_forward(module: nn.Module) -> Callable | None:
    if "forward" in vars(module):  # someone else replaced it
        return None
    if type(module).__name__.endswith(NORMS) and not list(module.children()):
        return _norm_forward
    return _mlp_forward if all(hasattr(module, name) for name in GATED_MLP) and _is_gated_mlp(module) else None


def _compiled(module: Any, gpu: torch.device | None) -> Compiled | None:
    """``gpu``: where Liger's kernels are to be used."""
    if hasattr(module, "gate_proj"):
        forward = partial(_gated, module.act_fn)
        return liger.gated_of(forward, gpu) if gpu else elementwise.gated_of(forward, next(module.parameters()).device)
    forward = partial(_norm, module)
    return liger.norm_of(module, forward, gpu) if gpu else elementwise.norm_of(module, forward)


@torch.no_grad()
def _is_gated_mlp(mlp: Any) -> bool:
    """Does it compute what ``_mlp_forward`` does? Found by running it on made-up tokens, not by its class.

    It is run with small linear layers in place of its own, which may be on the meta device, or sharded.
    """
    if isinstance(mlp.act_fn, nn.Module) and list(mlp.act_fn.parameters()):
        return False
    twin = copy.copy(mlp)
    twin._modules = dict(mlp._modules) | {name: _small_linear(i) for i, name in enumerate(PROJECTIONS)}
    twin.training = False  # the twin's alone
    try:
        x_NH = torch.linspace(-3, 3, 8 * SMALL).cos().view(8, SMALL)
        made = twin.down_proj(_gated(twin.act_fn, twin.gate_proj(x_NH), twin.up_proj(x_NH)))
        return torch.equal(twin(x_NH), made)
    except Exception:  # a module of someone's own, with these names for something else
        return False


def _small_linear(i: int) -> nn.Linear:
    made = nn.Linear(SMALL, SMALL, bias=False, device="meta")
    made.weight = nn.Parameter(torch.linspace(-2, 2 + i, SMALL**2).sin().view(SMALL, SMALL))
    return made


def _learns(module: nn.Module) -> bool:
    """This asks the module and the mode alone, so that gradient checkpointing's second pass finds the same."""
    return module.training and torch.is_grad_enabled()


def _base_model_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not (self.training and torch.is_grad_enabled()):
        return type(self).forward(self, *args, **kwargs)
    with saved_tensors_hooks(_pack, _unpack):
        return type(self).forward(self, *args, **kwargs)


def _norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not (_learns(self) or _compiled_alone(self)):
        return type(self).forward(self, *args, **kwargs)
    inputs = *args, *self._parameters.values()
    return _made(self, partial(_norm, self), inputs)


def _mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if len(args) != 1 or kwargs or not (_learns(self) or _compiled_alone(self)):
        return type(self).forward(self, *args, **kwargs)
    return self.down_proj(_made(self, partial(_gated, self.act_fn), (self.gate_proj(*args), self.up_proj(*args))))


def _compiled_alone(module: Any) -> bool:
    """Whether compiled code runs without gradients. It is faster, and gives the same numbers as in training."""
    return module.compiled is not None and not torch.is_grad_enabled()


def _made(module: Any, function: Callable, inputs: tuple) -> torch.Tensor:
    """``function(*inputs)``, by compiled code if that takes them. In training its output need not be kept."""
    if module.compiled is not None and module.compiled.takes(*inputs):
        function = module.compiled
    return Recomputed.apply(function, *inputs) if _learns(module) else function(*inputs)


def _norm(norm: nn.Module, x: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
    """The norm's own forward with ``parameters`` in place of its own."""
    twin = copy.copy(norm)
    twin._parameters = dict(zip(norm._parameters, parameters, strict=True))
    return type(norm).forward(twin, x)


def _gated(act_fn: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return act_fn(gate) * up


class Recomputed(torch.autograd.Function):
    """``function(*inputs)``, one tensor, of which the backward pass keeps the inputs alone."""

    @staticmethod
    def forward(ctx, function: Callable, *inputs: torch.Tensor | None):
        out = function(*inputs)
        # Parameters are copied, because sharded ones may be gone by the backward pass. They are small.
        ctx.save_for_backward(*(x.detach().clone() if isinstance(x, nn.Parameter) else x for x in inputs))
        ctx.device, ctx.contiguous, device = out.device, out.is_contiguous(), out.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.function, ctx.second = function, None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if isinstance(ctx.function, COMPILED):
            ctx.second = None
            return None, *ctx.function.gradients(grad, *ctx.saved_tensors)
        leaves, out = _second_pass(ctx)
        ctx.second = None  # all others that needed it came before
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        return None, *(next(found) if needed else None for needed in ctx.needs_input_grad[1:])


def _second_pass(node: Any) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Inputs and output of a ``Recomputed``, made again with a graph of their own."""
    if node.second is None:
        leaves = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(node.saved_tensors, node.needs_input_grad[1:], strict=True)
        ]
        with torch.enable_grad(), torch.autocast(*node.autocast):
            node.second = leaves, node.function(*leaves)
    return node.second


class _Again(NamedTuple):
    """Kept in place of a view of a ``Recomputed``'s output, or of a copy that was cast to ``dtypes`` in turn."""

    node: Any  # a Recomputed's
    dtypes: tuple[torch.dtype, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _pack(tensor: torch.Tensor) -> _Again | tuple[torch.Tensor, int]:
    if again := _again(tensor):
        return again
    for see in _watchers:
        see(tensor)
    # Detached, or a node and the output that it keeps would keep each other. Parameters are not: ZeRO swaps their data.
    return (tensor if tensor.is_leaf else tensor.detach()), tensor._version


def _again(tensor: torch.Tensor) -> _Again | None:
    base = tensor._base if tensor._is_view() else tensor
    node: Any = base.grad_fn
    dtypes: tuple[torch.dtype, ...] = ()
    while node is not None and node.name() == CAST:
        dtypes = (node._input_metadata[0].dtype, *dtypes)
        node = node.next_functions[0][0]
    if not isinstance(node, Recomputed._backward_cls):  # type: ignore[attr-defined]
        return None
    same_layout = base.is_contiguous() and node.contiguous  # or sizes and strides would not locate elements
    if not (same_layout and tensor.requires_grad and tensor.dtype == base.dtype and tensor.device == node.device):
        return None
    return _Again(node, dtypes, tensor.size(), tensor.stride(), tensor.storage_offset())


def _unpack(kept: _Again | tuple[torch.Tensor, int]) -> torch.Tensor:
    if isinstance(kept, _Again):
        _, out = _second_pass(kept.node)
        out = out.detach()
        for dtype in kept.dtypes:
            out = out.to(dtype)
        return out.as_strided(kept.size, kept.stride, kept.offset)
    tensor, version = kept
    if tensor._version != version:  # autograd leaves this check to hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{tuple(tensor.shape)}, {tensor.dtype}, is at version {tensor._version}; expected version {version}"
        )
    return tensor
