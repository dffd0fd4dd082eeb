"""What the processes of a launch share: weights split by FSDP2, gradients averaged, a pass that one could not finish.

Weights are *replicated* (every process holds all of them), *sharded* over all processes by FSDP2, or sharded over the
processes of a node and replicated over nodes (HSDP). FSDP2 gathers a layer's weights before its pass and scatters its
gradients after it, in every micro-batch. Replicas average their gradients once a step, when all micro-batches are
done. DDP and FSDP2's own HSDP would do that within the last backward pass. There, a process that runs out of memory
leaves the others waiting, and nothing calls them back.

Within a pass the same holds for FSDP2's own collectives. ``Collectives`` counts them, so that a process that could not
finish a pass can join those that it still owes (``update/micro_batch_size.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from grpo.model.placing import is_sharded, local

IN_FLIGHT = 8  # gradients on their way at once


def mixed_precision_policy(compute_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Weights are gathered and multiplied in ``compute_dtype``, gradients reduced in float32, log-probabilities kept as
    they come (float32), and inputs as they are (masks and advantages are float32 too)."""
    return MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        output_dtype=None,
        cast_forward_inputs=False,
    )


class Collectives:
    """Counts the collectives of FSDP2's passes, and leaves out the first ``skipped`` of a pass.

    From the same start, every process makes the same collectives in the same order, whatever its tokens. So a process
    that failed after ``joined`` of them runs another pass, on a few tokens, that leaves out as many: the others find a
    partner for each of theirs. What is left out gives zeros, so the pass is worth nothing on any process.
    """

    def __init__(self, *models: nn.Module):
        self.joined = self.skipped = 0
        for module in (module for model in models for module in model.modules()):
            if not isinstance(module, FSDPModule):
                continue
            module.set_custom_all_gather(_AllGather(self))
            module.set_custom_reduce_scatter(_ReduceScatter(self))
            if hasattr(module, "set_reduce_scatter_unused_params"):  # torch 2.13; an expert that one process uses
                module.set_reduce_scatter_unused_params(True, recurse=False)

    def begin(self, *, skipped: int = 0) -> None:
        """Before a pass."""
        self.joined, self.skipped = 0, skipped

    def joins(self) -> bool:
        self.joined += 1
        return self.joined > self.skipped


class _Comm:
    def __init__(self, collectives: Collectives):
        self.collectives = collectives

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Comm):
    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if self.collectives.joins():
            return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


class _ReduceScatter(_Comm):
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self.collectives.joins():
            return dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        output_tensor.zero_()
        return None


def to_rest(model: nn.Module) -> None:
    """Bring FSDP2's modules to where a pass starts, after one that failed or had no backward pass.

    Weights are sharded again, and what FSDP2 remembers of the pass is forgotten: the next one then makes the same
    collectives on every process. Gradients that were reduced stay.
    """
    state = model._get_fsdp_state()
    if not hasattr(state._comm_ctx, "post_forward_order"):  # no pass yet
        return
    if hasattr(model, "reset_iter_state"):  # torch 2.13
        model.reset_iter_state()
        return
    torch.accelerator.synchronize()
    state._comm_ctx.all_gather_state = state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    idle = type(state._training_state).IDLE
    for one in state._state_ctx.all_states:
        one._modules_to_run_forward.clear()
        one._training_state = idle
        if group := one._fsdp_param_group:
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = None
            group._post_forward_indices.clear()
            group._training_state = idle
            group._to_sharded()
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def replicas(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The processes that hold the same weights, or the same part of them, as this one; None if it is the only one."""
    if accelerator.num_processes == 1:
        return None
    if not is_sharded(accelerator):
        return dist.group.WORLD
    config = accelerator.parallelism_config
    if config is None or not config.dp_replicate_enabled:
        return None
    return accelerator.torch_device_mesh["dp_replicate"].get_group()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average gradients over ``group``, in float32. A parameter without a gradient on this process has zeros."""
    pending: deque[tuple[torch.Tensor, torch.Tensor, dist.Work]] = deque()

    def finish() -> None:
        gradient, exact, work = pending.popleft()
        work.wait()
        gradient.copy_(exact.div_(group.size()))

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = local(parameter.grad)
        exact = gradient.float()
        pending.append((gradient, exact, dist.all_reduce(exact, group=group, async_op=True)))
        if len(pending) == IN_FLIGHT:
            finish()
    while pending:
        finish()
