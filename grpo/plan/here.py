"""A plan for the machine that this process is on: its CPU is timed, its GPUs are counted by data sheets."""

from __future__ import annotations

import torch
from accelerate import PartialState

from grpo.config import Recipe
from grpo.errors import UserError
from grpo.model.device_memory import total_memory
from grpo.model.devices import compute_dtype
from grpo.model.shape import Shape, find_shape
from grpo.plan.cards import sheet_for
from grpo.plan.plan import Plan, plan_for_cpu, plan_for_gpus
from grpo.plan.work import Lengths


def plan_here(recipe: Recipe, lengths: Lengths) -> Plan:
    """For the launch that this process is part of. Raises UserError where there is nothing to plan by: a model of a
    kind whose shape is not known, a GPU smaller than all data sheets, several processes on a CPU."""
    shape, state = find_shape(recipe.model.name), PartialState()
    if state.device.type == "cpu":
        if state.num_processes > 1:
            raise UserError("several processes on one CPU are not planned for")
        return plan_on_cpu(recipe, shape, lengths, price=None)
    name, memory = torch.cuda.get_device_name(state.device), total_memory(state.device)
    card = sheet_for(name, memory)
    if card is None:
        raise UserError(f"there is no data sheet here of {name}, nor of a smaller card")
    sharded = state.distributed_type.value == "FSDP"
    return plan_for_gpus(recipe, shape, card, lengths, gpus=state.num_processes, fsdp2=sharded, price=None)


def plan_on_cpu(recipe: Recipe, shape: Shape, lengths: Lengths, *, price: float | None) -> Plan:
    """For this process on this machine's CPU, whatever else the machine has."""
    device = torch.device("cpu")
    compute = str(compute_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    return plan_for_cpu(recipe, shape, lengths, capacity=total_memory(device), compute=compute, price=price)
