"""Do the processes of a run still compute the same run? Weights that several hold, and what all draw, are compared.

Replicas start from the same weights and make the same steps on the same gradients, so they are equal to the bit. A
faulty memory, another library or another file on one of them breaks that, and nothing else would show it: gradients of
different models are averaged, and the first process's is what is saved.
"""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, gather_object

from grpo.errors import RunError
from grpo.model.placing import local
from grpo.model.policy import Policy
from grpo.run.inputs import row_bytes

AT_ONCE = 1 << 22  # weights that are summed as whole numbers of 64 bits
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(policy: Policy) -> torch.Tensor:
    """A number of 64 bits, made of every bit of the weights and buffers (rotary frequencies, a router's biases) that
    this process holds, those of the reference too.

    Each tensor's numbers, taken as integers, are summed, and the sums weighed by the tensors' places. It reads the
    weights once and takes no memory.
    """
    models = [model for model in (policy.model, policy.reference) if model is not None]
    total = torch.zeros((), dtype=torch.int64, device=policy.device)
    for place, tensor in enumerate(t for model in models for t in (*model.parameters(), *model.buffers())):
        weights = local(tensor.detach())
        if weights.numel() and not weights.is_meta:
            numbers = weights.contiguous().view(-1).view(INTEGERS[weights.element_size()])
            for piece in numbers.split(AT_ONCE):
                total += (2 * place + 1) * piece.sum(dtype=torch.int64).to(total.device)
    return total


def check_weights(policy: Policy, step: int) -> None:
    """Compare weights over the processes that hold the same ones. Called by all processes, after ``step`` steps.

    Raises:
        RunError: on every process, where a rank's differ, with that rank.
    """
    accelerator = policy.accelerator
    if accelerator.num_processes == 1:
        return
    ranks = dist.get_process_group_ranks(policy.replicas) if policy.replicas is not None else []
    held = torch.tensor(min(ranks, default=accelerator.process_index), device=policy.device)  # names the part
    found = gather(torch.stack([held, fingerprint(policy)])[None]).tolist()
    different = [
        rank
        for part in {part for part, _ in found}
        for rank in _different({rank: value for rank, (of, value) in enumerate(found) if of == part})
    ]
    if different:
        raise RunError(
            f"{_named(different)} no longer holds the weights that the other processes hold, after step {step}: they "
            "would average gradients of different models. Usual causes are faulty memory, and other hardware or "
            "libraries there. Every checkpoint is of weights that were equal: go on with --resume, without that "
            "machine if it happens again (training.replica_check_every: 0 compares no more)"
        )


def check_drawn(rows: Iterable[object], what: str) -> None:
    """Compare what every process has drawn. Called by all processes.

    Raises:
        RunError: on every process, where a rank's rows differ, with that rank.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_bytes(row))
    mine = torch.tensor([int.from_bytes(digest.digest()[:8], "big", signed=True)], device=state.device)
    found = gather(mine).tolist()
    if different := _different(dict(enumerate(found))):
        raise RunError(
            f"{_named(different)} draws other {what} than the other processes: the files of `data`, the tokenizer, the "
            "code of the task or the recipe are not the same there. Make them the same, and go on with --resume"
        )


def _different(values: dict[int, int]) -> list[int]:
    """The ranks whose value is not that of most; of as many, the first rank's counts."""
    counts = Counter(values.values())
    most = max(counts.values())
    usual = next(value for value in values.values() if counts[value] == most)
    return [rank for rank, value in values.items() if value != usual]


def _named(ranks: list[int]) -> str:
    """Ranks with their machines. Called by all processes."""
    hosts = gather_object([socket.gethostname()])
    return " and ".join(f"rank {rank} (on {hosts[rank]})" for rank in sorted(ranks))
