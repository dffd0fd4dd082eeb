"""Code that is there for speed. Without it the numbers are the same, to rounding. A reader of the algorithm needs none.

Others take the three functions below and ``CannotPack``. The hf backend's compiled step also takes ``native``, which
compiles C++.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from grpo.kernels import grads_in_place, lean_activations, memory, packed_attention
from grpo.kernels.packed_attention import CannotPack as CannotPack

log = logging.getLogger("grpo")


def prepare_process() -> None:
    """Let the process give freed memory back to the system. Call it before any weights load. For CPUs alone."""
    if not torch.accelerator.is_available():
        memory.install()


def install(causal_lm: Any, device: torch.device, *, trains: bool, alone: bool) -> str | None:
    """Make a model's passes fast: layers that add their gradients in place, fewer activations kept, packed attention.

    ``trains`` is False for a copy that is a reference or generates. ``alone`` is False where FSDP listens to the
    gradients of the model's weights. A part that needs a private name which torch no longer has is left out, with a
    line in the log. Returns why the model can't compute packed rows on ``device``, or None if it can.
    """
    # Checkpointing computes whole layers again, so nothing within them is kept anyway.
    keeps_less = trains and not causal_lm.is_gradient_checkpointing
    if keeps_less and _has_all("keeping fewer activations", lean_activations.missing(), trains):
        lean_activations.install(causal_lm)
    if alone and _has_all("adding gradients in place", grads_in_place.missing(), trains):
        grads_in_place.install(causal_lm)
    return packed_attention.install(causal_lm, device)


def measure_kept(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that ``forward()`` keeps for a backward pass, weights included. Then it gives free memory to the system."""
    found: dict[int, int] = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
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
