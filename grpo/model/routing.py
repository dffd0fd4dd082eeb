"""The routers of a mixture of experts: what they choose in a pass, in which type they compute, and their biases.

Which modules are routers, and where their logits are in what they return, transformers' classes say themselves
(``_can_record_outputs``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from grpo.errors import UserError
from grpo.model.placing import assign, whole
from grpo.types import Routed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo.config import AlgorithmConfig

BIASES = ("e_score_correction_bias", "expert_bias")


class Router(NamedTuple):
    """A layer's router: its module, where its logits are in what it returns, whether its scores are sigmoids of them,
    and the name of the tensor that is added to the scores before it chooses, if there is one."""

    name: str
    module: nn.Module
    logits_at: int
    sigmoid: bool
    bias: str | None

    def routed(self, output: Any, experts_of_token: int) -> Routed:
        """What its forward returned: a tuple with logits, and mostly with the experts chosen, or logits alone."""
        parts = output if isinstance(output, tuple) else (output,)
        logits_NE = parts[self.logits_at if len(parts) > 1 else 0].flatten(0, -2)
        chosen = (p for p in parts if p.dtype in (torch.int64, torch.int32) and p.ndim == 2)
        chosen_NK = next(chosen, None)
        if chosen_NK is None:
            chosen_NK = logits_NE.detach().topk(experts_of_token, dim=-1).indices
        return Routed(logits_NE, chosen_NK, self.sigmoid)


class Routing:
    """The routers of a model that learns.

    ``recorded`` gives what they chose in the passes within it that have a gradient. What gradient checkpointing
    repeats of them comes after, in the backward pass.
    """

    def __init__(self, causal_lm: PreTrainedModel, routers: list[Router]):
        config: Any = causal_lm.config.get_text_config(decoder=True)
        self.causal_lm = causal_lm
        self.routers = routers
        self.experts_of_token = int(getattr(config, "num_experts_per_tok", None) or 1)
        self._recorded: list[Routed] | None = None
        for router in routers:
            router.module.register_forward_hook(self._hook(router))

    def _hook(self, router: Router) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            # Nothing is computed here: gradient checkpointing repeats passes, and wants the same operations.
            if self._recorded is not None and torch.is_grad_enabled():
                self._recorded.append(router.routed(output, self.experts_of_token))

        return hook

    @contextmanager
    def recorded(self) -> Iterator[list[Routed]]:
        """A list that gets an entry a layer, in the order of layers, during a pass."""
        self._recorded = found = []
        try:
            yield found
        finally:
            self._recorded = None

    @property
    def biases(self) -> dict[str, torch.Tensor]:
        """The routers' biases by their names in the model; empty where a layer has none."""
        names = [router.bias for router in self.routers if router.bias is not None]
        state = self.causal_lm.state_dict(keep_vars=True)
        return {name: state[name] for name in names} if len(names) == len(self.routers) else {}

    def largest_bias(self) -> float:
        return max(float(bias.detach().abs().max()) for bias in self.biases.values())

    @torch.no_grad()
    def move_biases(self, moves: Sequence[torch.Tensor]) -> None:
        """Add to the biases, (E,) a layer. Called with the same numbers on every process."""
        for bias, moves_E in zip(self.biases.values(), moves, strict=True):
            held = whole(bias.detach())
            assign(bias, held + moves_E.to(held))


def routing_of(causal_lm: PreTrainedModel, algorithm: AlgorithmConfig) -> Routing | None:
    """None for a model without experts. Raises UserError where ``algorithm`` asks for what the model does not have."""
    found, name = routers_of(causal_lm), type(causal_lm).__name__
    asked = [k for k in ("router_aux_loss_coef", "router_bias_update_rate") if getattr(algorithm, k) > 0]
    if asked and not found:
        raise UserError(f"algorithm.{asked[0]}: {name} has no experts, so no router; leave it out")
    routing = Routing(causal_lm, found) if found else None
    if algorithm.router_bias_update_rate > 0 and routing is not None and not routing.biases:
        raise UserError(
            f"algorithm.router_bias_update_rate: the routers of {name} have no bias that could be moved (as those of "
            "DeepSeek-V3 have, e_score_correction_bias); use algorithm.router_aux_loss_coef"
        )
    return routing


def routers_of(causal_lm: nn.Module) -> list[Router]:
    """The routers of a model's layers, in their order."""
    found: dict[str, Router] = {}
    names = dict(causal_lm.named_modules())
    biases = [name for name in causal_lm.state_dict(keep_vars=True) if name.rpartition(".")[2] in BIASES]
    for part in names.values():
        specs = (getattr(type(part), "_can_record_outputs", None) or {}).get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            for name, module in names.items():
                target = getattr(spec, "target_class", spec)
                within = getattr(spec, "layer_name", None)
                if isinstance(module, target) and (within is None or within in name):
                    block = name.rpartition(".")[0]
                    bias = next((b for b in biases if b.startswith(f"{block}.")), None)
                    at = getattr(spec, "index", 0)
                    found[name] = Router(name, module, at, _by_sigmoid(type(module)), bias)
    return [found[name] for name in names if name in found]


def route_in_compute_type(causal_lm: nn.Module) -> None:
    """Let routers choose under autocast as they do in a copy whose weights are in autocast's type.

    A router that asks for a product in float32 gets one in bfloat16 under autocast. Of two experts with near scores the
    policy then takes another one than the copy that samples, which has no autocast. So its weights and inputs are
    rounded as the copy's are, and the rest is computed as its code says.
    """
    for router in routers_of(causal_lm):
        # A few classes of transformers have routers that are linear layers, or whole blocks of experts.
        if type(router.module) is not nn.Linear and all(isinstance(m, nn.Linear) for m in router.module.children()):
            router.module.forward = _as_the_copy(router.module, router.module.forward)  # type: ignore[method-assign]


def _as_the_copy(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        device = arguments[0].device.type if arguments else "meta"
        if device == "meta" or not torch.is_autocast_enabled(device):
            return plain(*arguments, **keywords)
        hidden, *others = arguments
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False), _rounded(module, dtype):
            return plain(hidden.to(dtype), *others, **keywords)

    return forward


@contextmanager
def _rounded(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the module's weights are in ``dtype``, with gradients to the weights themselves."""
    held = [(owner, dict(owner._parameters)) for owner in module.modules()]
    try:
        for owner, parameters in held:
            rounded = {n: p.to(dtype) for n, p in parameters.items() if p is not None and n not in BIASES}
            owner._parameters.update(rounded)  # type: ignore[arg-type]  # they are read as weights are
        yield
    finally:
        for owner, parameters in held:
            owner._parameters.update(parameters)


def _by_sigmoid(router: type[nn.Module]) -> bool:
    """Whether scores are sigmoids: no configuration says it, only the code of the class does."""
    try:
        return "sigmoid(" in inspect.getsource(router.forward)
    except (OSError, TypeError):  # no source at hand
        return False
