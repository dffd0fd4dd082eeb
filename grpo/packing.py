"""Sequences into micro-batches: by token budget, the same number on every process, the same plan everywhere.

Every process knows all sequences of the optimizer step (the trainer gathers them: a few megabytes of integers),
computes the same plan from them and takes its own share: nothing about the split has to be communicated.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from grpo.types import Batch, Sequence


def plan_micro_batches(
    sequences: list[Sequence], *, max_tokens: int, max_sequences: int | None = None, world_size: int = 1
) -> list[list[list[Sequence]]]:
    """For every process its micro-batches: ``plan[rank][i]`` is a list of sequences.

    Sequences are taken longest first, so that those padded together are of like length; a micro-batch is closed when
    its padded size (sequences x longest) would pass ``max_tokens``. A single sequence longer than the budget gets a
    micro-batch of its own. Micro-batches are dealt to the process with the least work so far; where the count does not
    divide, processes get a zero-weight micro-batch, because unequal counts hang FSDP and ZeRO.
    """
    if not sequences:
        return [[] for _ in range(world_size)]
    by_length = sorted(sequences, key=len, reverse=True)
    # Several processes want at least one micro-batch each, or all but one would only pad.
    cap = -(-len(by_length) // world_size)
    limit = min(cap, max_sequences) if max_sequences else cap
    micro_batches: list[list[Sequence]] = []
    for sequence in by_length:
        current = micro_batches[-1] if micro_batches else None
        if current and len(current) < limit and (len(current) + 1) * len(current[0]) <= max_tokens:
            current.append(sequence)
        else:
            micro_batches.append([sequence])

    plan: list[list[list[Sequence]]] = [[] for _ in range(world_size)]
    rounds = -(-len(micro_batches) // world_size)
    work = [0] * world_size
    for micro_batch in sorted(micro_batches, key=padded_tokens, reverse=True):
        open_ranks = [rank for rank in range(world_size) if len(plan[rank]) < rounds]
        rank = min(open_ranks, key=lambda r: (work[r], r))
        plan[rank].append(micro_batch)
        work[rank] += padded_tokens(micro_batch)
    filler = [replace(by_length[-1], weight=0.0)]
    for share in plan:
        share.extend([filler] * (rounds - len(share)))
    return plan


def padded_tokens(micro_batch: list[Sequence]) -> int:
    return len(micro_batch) * max(len(s) for s in micro_batch)


def collate(sequences: list[Sequence], *, pad_token_id: int, device: torch.device | str = "cpu") -> Batch:
    """Right-pad a micro-batch. T is the longest prompt + completion in it.

    All of (B,T) describe the token at that position; completion positions of an invalid or zero-weight sequence are
    still computed (the shapes stay the same on every process) but do not count.
    """
    B, T = len(sequences), max(len(s) for s in sequences)
    input_ids_BT = torch.full((B, T), pad_token_id, dtype=torch.long)
    completion_mask_BT = torch.zeros((B, T), dtype=torch.bool)
    mask_BT = torch.zeros((B, T))
    optional = {
        "sampler_logprobs": torch.zeros((B, T)),
        "old_logprobs": torch.zeros((B, T)),
        "ref_logprobs": torch.zeros((B, T)),
    }
    for i, s in enumerate(sequences):
        start, end = len(s.prompt_ids), len(s)
        input_ids_BT[i, :end] = torch.tensor(s.prompt_ids + s.completion_ids)
        completion_mask_BT[i, start:end] = True
        mask_BT[i, start:end] = s.weight if s.valid else 0.0
        for name, tensor in optional.items():
            values = getattr(s, name)
            if values is not None:
                tensor[i, start:end] = torch.tensor(values)

    def on_device(name: str) -> torch.Tensor | None:
        return optional[name].to(device) if getattr(sequences[0], name) is not None else None

    return Batch(
        input_ids_BT=input_ids_BT.to(device),
        completion_mask_BT=completion_mask_BT.to(device),
        mask_BT=mask_BT.to(device),
        advantages_B=torch.tensor([s.advantage for s in sequences], dtype=torch.float32).to(device),
        sampler_logps_BT=optional["sampler_logprobs"].to(device),
        old_logps_BT=on_device("old_logprobs"),
        ref_logps_BT=on_device("ref_logprobs"),
    )
