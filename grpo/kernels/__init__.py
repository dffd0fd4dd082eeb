"""Code that is there for speed. Without it the numbers are the same, to rounding. A reader of the algorithm needs none.

Others take the three functions below and ``CannotPack``. The hf backend's compiled step also takes ``native``, which
compiles C++.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from grpo.errors import UserError
from grpo.kernels import float32_head, grads_in_place, lean_activations, liger, memory, packed_attention
from grpo.kernels.packed_attention import CannotPack as CannotPack

log = logging.getLogger("grpo")
Wanted = str | list[str]  # model.kernels


def prepare_process() -> None:
    """Let the process give freed memory back to the system. Call it before any weights load. For CPUs alone."""
    if not torch.accelerator.is_available():
        memory.install()


def install(
    causal_lm: Any, device: torch.device, *, trains: bool, alone: bool, wanted: Wanted = "auto", says: bool = True
) -> str | None:
    """Make a model's passes fast: layers that add their gradients in place, fewer activations kept, packed attention,
    and what ``wanted`` (``model.kernels``) names.

    ``trains`` is False for a copy that is a reference or generates. ``alone`` is False where FSDP listens to the
    gradients of the model's weights. A part that needs a private name which torch no longer has is left out, with a
    line in the log, unless not ``says``. Returns why the model can't compute packed rows on ``device``, or None if it
    can. Raises UserError where a kernel was asked for by name and can't be had.
    """
    says = says and trains
    in_place = alone and _has_all("adding gradients in place", grads_in_place.missing(), says)
    if in_place:
        grads_in_place.install(causal_lm)
    if _is_on("float32_head", wanted, device, partial(float32_head.why_not, causal_lm), says):
        float32_head.install(causal_lm, alone=in_place)
    # Checkpointing computes whole layers again, so nothing within them is kept anyway.
    with_liger = trains and _is_on("liger", wanted, device, liger.why_not, says)
    keeps_less = trains and (with_liger or not causal_lm.is_gradient_checkpointing)
    if keeps_less and _has_all("keeping fewer activations", lean_activations.missing(), says):
        fused = lean_activations.install(causal_lm, device if with_liger else None)
        if with_liger and says:
            log.info("update: Liger computes %d norms and gated MLPs; results and gradients are those without", fused)
    return packed_attention.install(causal_lm, device)


def _is_on(
    name: str, wanted: Wanted, device: torch.device, why_not: Callable[[torch.device], str | None], says: bool
) -> bool:
    """Whether a kernel that ``model.kernels`` may name is to be used."""
    if wanted == "none" or (wanted == "auto" and device.type == "cpu") or (wanted != "auto" and name not in wanted):
        return False
    if (why := why_not(device)) is None:
        return True
    if wanted != "auto":
        raise UserError(f"model.kernels: {name} can't be had: {why}; take it off the list, or set auto")
    if says:
        log.info("update: without %s: %s", name, why)
    return False


def measure_kept(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that ``forward()`` keeps for a backward pass, weights included. Then it gives free memory to the system."""
    found: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage.nbytes()  # not its address, which fake tensors do not have
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor)
    with torch.enable_grad(), hooks, lean_activations.watching(see):
        out = forward()
    del out
    memory.trim()
    return sum(found.values())


def _has_all(part: str, missing: str | None, says: bool) -> bool:
    if missing is not None and says:
        log.info("update: %s is left out, which costs memory or time: this torch has no %s", part, missing)
    return missing is None
