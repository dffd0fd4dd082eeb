"""AdamW in little memory: weights in bfloat16, moments in 8 bits, its state in the host's memory; any mixture of them.

The arithmetic is that of libraries, in float32: torch's fused AdamW, or bitsandbytes' with 8-bit moments. What is here
is how numbers are held between steps, and a step goes through a weight in pieces, so that float32 copies stay small.

- **bfloat16 weights** keep the lower half of a float32 number apart (``low``, 16 bits): both together are the float32
  weight. It is Kahan's compensation, but exact, so an update far below a weight's last bit is never lost. The weight
  itself is the float32 number rounded to nearest, as autocast would round it.
- **8-bit moments** (arXiv:2110.02861) are quantized in blocks of 256 along a row. bitsandbytes' own optimizer lets
  blocks cross rows; here they don't, so FSDP2 may cut between rows, and a checkpoint is the same for any cut.
- **Offloaded** state travels to the device piece by piece and back, and the numbers are those of a state that stays.

With FSDP2 each process steps its shard. Every tensor of the state has as many rows as its weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from grpo.model.placing import cut_as

log = logging.getLogger("grpo")

PIECE = 1 << 24  # elements of a weight stepped at once: 64 MB for each float32 copy
ALIGNED = 64  # rows: on a CPU torch steps the last few elements of a tensor otherwise, which rounds otherwise
BLOCK = 256  # elements that share a scale, in bitsandbytes' kernels
LEAST_8BIT = 4096  # smaller tensors keep float32 moments, as bitsandbytes has it
WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes' newer versions keep their 8-bit state under this name

State = dict[str, torch.Tensor]


class CompactAdamW(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with ``eight_bit`` moments or float32 ones, in host memory if ``offload``.

    Weights are float32 or bfloat16, plain tensors or DTensors cut along their rows. ``state_dict`` holds the state as
    it is held here, and loads on any number of processes.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        eight_bit: bool = False,
        offload: bool = False,
    ):
        self.eight_bit, self.offload = eight_bit, offload
        self.maps: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self.streams: list[Any] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        turns = self._turns()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.state[parameter].update(self._new_state(parameter))
                state = self.state[parameter]
                state["step"] += 1
                weight_RC, grad_RC = _rows(parameter), _rows(parameter.grad)
                held = {name: _local(tensor) for name, tensor in state.items() if name != "step"}
                rows = max(ALIGNED, PIECE // max(1, weight_RC.shape[1]) // ALIGNED * ALIGNED)
                for start in range(0, weight_RC.shape[0], rows):
                    piece = slice(start, start + rows)
                    part = {name: tensor[piece] for name, tensor in held.items()}
                    turns.append(turns.pop(0))
                    with turns[-1]:
                        self._step_piece(weight_RC[piece], grad_RC[piece], part, group, int(state["step"]))
        for stream in self.streams:
            stream.synchronize()

    def _turns(self) -> list[AbstractContextManager]:
        """What pieces are stepped within, by turns. On CUDA offloaded ones get two streams: one piece's state travels
        back while the next one's comes. bitsandbytes launches its optimizer on the default stream, whatever the current
        one is, and other streams do not wait for that; so 8-bit pieces are copied there too."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        if device is None or device.type != "cuda" or not self.offload:
            return [nullcontext()]
        if not self.streams:
            several = [torch.cuda.Stream(device) for _ in range(2)]
            self.streams = [torch.cuda.default_stream(device)] if self.eight_bit else several
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream(device))  # gradients are there
        return [torch.cuda.stream(stream) for stream in self.streams]

    def _step_piece(
        self, weight_RC: torch.Tensor, grad_RC: torch.Tensor, part: State, group: dict[str, Any], step: int
    ) -> None:
        here = {name: tensor.to(weight_RC.device, non_blocking=True) for name, tensor in part.items()}
        master_RC = joined(weight_RC, here["low"]) if "low" in here else weight_RC
        if "codes1" in here:
            self._adamw_8bit(master_RC, grad_RC.float(), here, group, step)
        else:
            _adamw_float32(master_RC, grad_RC.float(), here, group, step)
        if "low" in here:
            split_into(weight_RC, here["low"], master_RC)
        for name, tensor in part.items():
            if here[name] is not tensor:
                tensor.copy_(here[name], non_blocking=True)

    def _adamw_8bit(
        self, weight_RC: torch.Tensor, grad_RC: torch.Tensor, moments: State, group: dict[str, Any], step: int
    ) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        signed, unsigned = self._maps_on(weight_RC.device)
        columns, padding = weight_RC.shape[1], moments["codes1"].shape[1] - weight_RC.shape[1]
        padded_RC = nn.functional.pad(weight_RC, (0, padding)) if padding else weight_RC
        optimizer_update_8bit_blockwise(
            "adam",
            nn.functional.pad(grad_RC, (0, padding)).contiguous(),
            padded_RC,
            moments["codes1"],
            moments["codes2"],
            *group["betas"],
            0.0,
            0.0,
            group["eps"],
            step,
            group["lr"],
            signed,
            unsigned,
            moments["scales1"].view(-1),
            moments["scales2"].view(-1),
            group["weight_decay"],
        )
        if padding:
            weight_RC.copy_(padded_RC[:, :columns])

    def _maps_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers that codes of the first and the second moment stand for."""
        if device not in self.maps:
            from bitsandbytes.functional import create_dynamic_map

            self.maps[device] = create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
        return self.maps[device]

    # -----------------------------------------------------------------------------------------------------------------
    # The state

    def _new_state(self, parameter: torch.Tensor) -> State:
        state: State = {"step": torch.tensor(0.0)}
        shape = _rows(parameter).shape
        if self.eight_bit and parameter.numel() >= LEAST_8BIT:
            blocks = -(-shape[1] // BLOCK)
            for moment in "12":
                state[f"codes{moment}"] = self._zeros(parameter, (shape[0], blocks * BLOCK), torch.uint8)
                state[f"scales{moment}"] = self._zeros(parameter, (shape[0], blocks), torch.float32)
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = self._zeros(parameter, _local(parameter).shape, torch.float32)
        if parameter.dtype == torch.bfloat16:
            state["low"] = self._zeros(parameter, (shape[0], 2 * shape[1]), torch.uint8)  # no backend gathers int16
        return state

    def _zeros(self, parameter: torch.Tensor, shape: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of the state, with this process's rows of ``parameter``."""
        cuda = parameter.device.type == "cuda"
        where = {"device": "cpu", "pin_memory": cuda} if self.offload else {"device": parameter.device}
        zeros = torch.zeros(tuple(shape), dtype=dtype, **where)
        return cut_as(parameter, zeros) if isinstance(parameter, DTensor) else zeros

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; torch's own method would round moments to the weights' type.

        Tensors are whole, or cut as the weights are. The state of bitsandbytes' AdamW is taken too; blocks that crossed
        rows are quantized again. Raises ValueError where it is of other weights.
        """
        saved_groups = state_dict["param_groups"]
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError("the optimizer's saved state is that of another number of weights")
        self.state.clear()  # the saved one may be of before the first step
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: saved[name] for name in ("lr", "betas", "eps", "weight_decay")})
            for number, parameter in zip(saved["params"], group["params"], strict=True):
                if number in state_dict["state"]:
                    self.state[parameter] = self._taken_over(parameter, state_dict["state"][number])

    @torch.no_grad()
    def _taken_over(self, parameter: torch.Tensor, saved: dict[str, Any]) -> State:
        state = self._new_state(parameter)
        if "state1" in saved or WRAPPED in saved:
            saved = self._from_bitsandbytes(parameter, saved)
        if saved.keys() != state.keys():
            raise ValueError(
                f"the optimizer's saved state has {', '.join(saved)}, this recipe's has {', '.join(state)}: "
                "optimizer.optim and model.weights must be those that it was saved with"
            )
        for name, tensor in state.items():
            value = torch.as_tensor(saved[name])
            if isinstance(tensor, DTensor) and not isinstance(value, DTensor):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value.to(parameter.device), tensor.device_mesh, tensor.placements)
            _local(tensor).copy_(_local(value))
        return state

    def _from_bitsandbytes(self, parameter: torch.Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

        step = torch.tensor(float(saved["step"]))
        saved = saved | saved.get(WRAPPED, {})
        if saved["state1"].dtype != torch.uint8:
            return {"step": step, "exp_avg": saved["state1"], "exp_avg_sq": saved["state2"]}
        state = {"step": step}
        columns = parameter.numel() // parameter.shape[0]
        padding = -columns % BLOCK
        for moment in "12":
            codes, scales = saved[f"state{moment}"].cpu(), saved[f"absmax{moment}"].cpu()
            if padding:
                code = saved[f"qmap{moment}"].cpu()
                plain = dequantize_blockwise(codes, absmax=scales, code=code, blocksize=BLOCK)
                rows = nn.functional.pad(plain.view(-1, columns), (0, padding)).contiguous()
                codes, made = quantize_blockwise(rows, code=code, blocksize=BLOCK)
                scales = made.absmax
            state[f"codes{moment}"] = codes.view(parameter.shape[0], -1)
            state[f"scales{moment}"] = scales.view(parameter.shape[0], -1)
        if padding:
            log.info("optimizer: moments in 8 bits of an earlier version are quantized again, row by row")
        return state


def joined(high_RC: torch.Tensor, low_RB: torch.Tensor) -> torch.Tensor:
    """The float32 numbers, (R,C), of which ``high_RC`` (bfloat16) are the rounded values, and ``low_RB`` the rest, in
    two bytes (uint8) each."""
    bits_RC = high_RC.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits_RC.add_(low_RB.view(torch.int16)).view(torch.float32)


def split_into(high_RC: torch.Tensor, low_RB: torch.Tensor, master_RC: torch.Tensor) -> None:
    """Inverse of ``joined``. Halves are rounded away from zero, where a cast would round them to even."""
    bits_RC = master_RC.view(torch.int32)
    upper_RC = (bits_RC + 0x8000).bitwise_right_shift_(16)
    high_RC.view(torch.int16).copy_(upper_RC)
    low_RB.view(torch.int16).copy_(bits_RC - upper_RC.bitwise_left_shift_(16))


def _adamw_float32(
    weight_RC: torch.Tensor, grad_RC: torch.Tensor, moments: State, group: dict[str, Any], step: int
) -> None:
    adamw(
        [weight_RC],
        [grad_RC],
        [moments["exp_avg"].view_as(weight_RC)],
        [moments["exp_avg_sq"].view_as(weight_RC)],
        [],
        [torch.full((), step - 1.0, device=weight_RC.device)],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight or gradient as a matrix. A vector is a single column."""
    local = _local(tensor.detach())
    return local.view(local.shape[0], math.prod(local.shape[1:]))  # a process may have no row
