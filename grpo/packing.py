"""Scored groups become sequences, and these micro-batches: within a token budget, the same number on every process.

Every process knows all sequences of the optimizer step (``rollout/groups.py`` gathers them: a few megabytes of
integers), computes the same plan from them and takes its own share. So nothing about the split has to be communicated.

A micro-batch is either *packed*, one row in which a prompt stands once for all its completions, or *padded*, a row for
each sequence, for models that can't compute packed rows (``Policy.packed`` says which).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from grpo.config import AlgorithmConfig
from grpo.types import Batch, Completion, Group, Layout, Status, TeacherSays, TrainedSequence

# For a group that does not fit into the rest of a micro-batch: if the micro-batch is at least this full, the group
# starts another one; else the group is split, and its prompt computed twice. Both values are tried: the first repeats
# fewer prompts, the second balances processes better.
FULL = (0.5, 0.95)

MicroBatch = list[TrainedSequence]
Sized = tuple[int, MicroBatch]  # with its number of tokens


def to_sequences(
    groups: list[Group], advantages: np.ndarray, algorithm: AlgorithmConfig, *, scored: bool = True
) -> list[TrainedSequence]:
    """Flatten scored groups, G completions each. ``advantages`` are (P,G), or (P,G,U) with one for each turn of an
    episode. Tokens that the sampler gave no finite log-probability do not count, nor do an environment's.
    ``scored``: a completion without a reward does not count either.
    """
    made = [
        TrainedSequence(
            prompt_ids=group.prompt.token_ids,
            completion_ids=completion.token_ids,
            sampler_logprobs=logprobs,
            advantage=_of_tokens(completion, advantage) if np.ndim(advantage) else float(advantage),
            valid=counts_in_loss(completion, reward if scored else 0.0, algorithm),
            uncounted=uncounted,
            environment=environment,
        )
        for group, advantages_G in zip(groups, advantages, strict=True)
        for completion, reward, advantage in zip(group.completions, group.rewards, advantages_G, strict=True)
        for environment in [completion.environment_places()]
        for logprobs, uncounted in [_finite(_without(environment, completion.sampler_logprobs))]
    ]
    if not groups or groups[0].teacher is None:
        return made
    says = [of for group in groups for of in group.teacher or []]
    return [replace(s, teacher=of) for s, of in zip(made, says, strict=True)]


def _of_tokens(completion: Completion, advantages_U: np.ndarray) -> list[float]:
    """The advantage of each token, which is its turn's; 0 at the environment's."""
    of_tokens = [0.0] * len(completion.token_ids)
    for turn, advantage in zip(completion.episode.turns if completion.episode else [], advantages_U, strict=False):
        of_tokens[turn.start : turn.end] = [float(advantage)] * (turn.end - turn.start)
    return of_tokens


def _without(environment: Sequence[int], logprobs: Sequence[float]) -> Sequence[float]:
    """The log-probabilities, with 0 for the environment's tokens, whatever an engine claims of them."""
    if not environment:
        return logprobs
    own = list(logprobs)
    for place in environment:
        own[place] = 0.0
    return own


def _finite(logprobs: Sequence[float]) -> tuple[Sequence[float], tuple[int, ...]]:
    """The log-probabilities with 0 where one is not finite, and where that is."""
    if math.isfinite(sum(logprobs)):  # the usual case, and quick
        return logprobs, ()
    finite = [x if math.isfinite(x) else 0.0 for x in logprobs]
    return finite, tuple(place for place, x in enumerate(logprobs) if not math.isfinite(x))


def counts_in_loss(completion: Completion, reward: float | None, algorithm: AlgorithmConfig) -> bool:
    """Whether a completion counts in the loss and its denominators. It does not if it could not be scored, or if it was
    truncated and the recipe masks truncated ones."""
    masked = algorithm.mask_truncated_completions and completion.status is Status.LENGTH
    return reward is not None and not masked and completion.status is not Status.ERROR


def plan_micro_batches(
    sequences: list[TrainedSequence],
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    world_size: int = 1,
    packed: bool = True,
) -> list[list[MicroBatch]]:
    """For every process its micro-batches: ``plan[rank][i]`` is a list of sequences.

    No micro-batch has more than ``max_tokens`` tokens (``packed_tokens`` or ``padded_tokens``), unless a single
    sequence does. Of several ways to fill them, the one with the fewest tokens on the busiest process is taken; on a
    tie, the one with the fewest micro-batches. If these do not divide by the processes, some processes get one more, of
    zero weight, because unequal counts hang FSDP.
    """
    if not sequences:
        return [[] for _ in range(world_size)]
    # Few enough sequences in each that every process gets a micro-batch; else some would compute only padding.
    most = min(max_sequences or len(sequences), -(-len(sequences) // world_size))
    if packed:
        groups = by_prompt(sequences)
        fillings = [partial(_fill_packed, groups, most=most, full=full) for full in FULL]
    else:
        fillings = [partial(_fill_padded, sorted(sequences, key=len, reverse=True), most=most)]
    ways = [_deal(made, world_size) for fill in fillings for made in _smaller_and_smaller(fill, max_tokens, world_size)]
    shares = min(ways, key=lambda shares: (max(sum(t for t, _ in share) for share in shares), max(map(len, shares))))
    rounds = max(map(len, shares))
    filler = [replace(min(sequences, key=len), weight=0.0)]
    return [[micro_batch for _, micro_batch in share] + [filler] * (rounds - len(share)) for share in shares]


def by_prompt(sequences: list[TrainedSequence]) -> list[list[TrainedSequence]]:
    """Sequences of the same prompt together, the most tokens first; within a group the longest first."""
    groups: dict[tuple[int, ...], list[TrainedSequence]] = {}
    for sequence in sequences:
        groups.setdefault(tuple(sequence.prompt_ids), []).append(sequence)
    ordered = [sorted(group, key=len, reverse=True) for group in groups.values()]
    return sorted(ordered, key=packed_tokens, reverse=True)


def packed_tokens(micro_batch: MicroBatch) -> int:
    """Tokens of the packed row: each prompt once, and of each completion all but the last, which predicts nothing."""
    prompts = {tuple(s.prompt_ids) for s in micro_batch}
    return sum(map(len, prompts)) + sum(map(_read, micro_batch))


def padded_tokens(micro_batch: MicroBatch) -> int:
    return len(micro_batch) * max(map(len, micro_batch))


def _read(sequence: TrainedSequence) -> int:
    return max(len(sequence.completion_ids) - 1, 0)


def _smaller_and_smaller(fill: Callable[[int], list[Sized]], limit: int, world_size: int) -> Iterator[list[Sized]]:
    """Fillings with ever smaller limits, while they take no more rounds: work that fits on one process is shared."""
    made = fill(limit)
    rounds = -(-len(made) // world_size)
    while -(-len(made) // world_size) <= rounds:
        yield made
        largest, micro_batch = max(made, key=lambda sized: sized[0])
        if len(micro_batch) == 1:
            return
        made = fill(largest * 19 // 20)


def _fill_packed(groups: list[list[TrainedSequence]], limit: int, *, most: int, full: float) -> list[Sized]:
    """Group after group, whole ones where they fit; see FULL for those that don't."""
    made: list[Sized] = []
    tokens, micro_batch = 0, MicroBatch()
    for group in groups:
        prompt = len(group[0].prompt_ids)
        fits = tokens + prompt + sum(map(_read, group)) <= limit and len(micro_batch) + len(group) <= most
        closed = not fits and tokens >= full * limit
        added = prompt
        for sequence in group:
            added += _read(sequence)
            if micro_batch and (closed or tokens + added > limit or len(micro_batch) == most):
                made.append((tokens, micro_batch))
                tokens, micro_batch, closed = 0, [], False
                added = prompt + _read(sequence)
            micro_batch.append(sequence)
            tokens += added
            added = 0
    return [*made, (tokens, micro_batch)]


def _fill_padded(rows: list[TrainedSequence], limit: int, *, most: int) -> list[Sized]:
    """Longest first, so that sequences padded together have similar lengths."""
    made: list[MicroBatch] = []
    for sequence in rows:
        if made and len(made[-1]) < most and (len(made[-1]) + 1) * len(made[-1][0]) <= limit:
            made[-1].append(sequence)
        else:
            made.append([sequence])
    return [(padded_tokens(micro_batch), micro_batch) for micro_batch in made]


def _deal(micro_batches: list[Sized], world_size: int) -> list[list[Sized]]:
    """Shares of the processes: the largest first, each to the least busy process that does not have its number yet."""
    shares: list[list[Sized]] = [[] for _ in range(world_size)]
    rounds = -(-len(micro_batches) // world_size)
    work = [0] * world_size
    for sized in sorted(micro_batches, key=lambda sized: sized[0], reverse=True):
        rank = min((r for r in range(world_size) if len(shares[r]) < rounds), key=lambda r: (work[r], r))
        shares[rank].append(sized)
        work[rank] += sized[0]
    return shares


def collate(
    micro_batch: MicroBatch, *, pad_token_id: int, device: torch.device | str = "cpu", packed: bool = True
) -> Batch:
    """A micro-batch as tensors: a packed row, or padded ones.

    All (B,T) tensors describe the completion's token at that position. Invalid or zero-weight sequences are still
    computed (shapes stay the same on every process) but do not count.
    """
    if packed:
        input_ids_RN, layout, first_B, rest_B = _packed_row(micro_batch, device)
    else:
        input_ids_RN, layout = _padded_rows(micro_batch, pad_token_id), None
        first_B = [row * input_ids_RN.shape[1] + len(s.prompt_ids) - 1 for row, s in enumerate(micro_batch)]
        rest_B = [first + 1 for first in first_B]
    B, T = len(micro_batch), max(1, *(len(s.completion_ids) for s in micro_batch))
    completion_ids_BT = torch.full((B, T), pad_token_id)
    predicts_BT = torch.zeros((B, T), dtype=torch.long)
    completion_mask_BT = torch.zeros((B, T), dtype=torch.bool)
    mask_BT = torch.zeros((B, T))
    names = ["sampler_logprobs", "old_logprobs", "ref_logprobs", "kept", "log_left"]
    per_token = {name: torch.zeros((B, T)) for name in names if getattr(micro_batch[0], name) is not None}
    for i, s in enumerate(micro_batch):
        length = len(s.completion_ids)
        completion_ids_BT[i, :length] = torch.tensor(s.completion_ids)
        predicts_BT[i, :1] = first_B[i]
        predicts_BT[i, 1:length] = torch.arange(rest_B[i], rest_B[i] + max(length - 1, 0))
        completion_mask_BT[i, :length] = True
        mask_BT[i, :length] = s.weight if s.valid else 0.0
        if s.uncounted:
            mask_BT[i, list(s.uncounted)] = 0.0
        if s.environment:
            completion_mask_BT[i, list(s.environment)] = False
            mask_BT[i, list(s.environment)] = 0.0
        for name, tensor in per_token.items():
            tensor[i, :length] = torch.tensor(getattr(s, name))
    per_token = {name: tensor.to(device) for name, tensor in per_token.items()}
    teacher_logps_BT, teacher_ids_BTK, teacher_top_BTK = _of_teacher(micro_batch, T, device)
    return Batch(
        input_ids_RN=input_ids_RN.to(device),
        layout=layout,
        completion_ids_BT=completion_ids_BT.to(device),
        predicts_BT=predicts_BT.to(device),
        completion_mask_BT=completion_mask_BT.to(device),
        places_M=torch.cat([_places(s) + i * T for i, s in enumerate(micro_batch)]).to(device),
        mask_BT=mask_BT.to(device),
        advantages=_advantages(micro_batch, T).to(device),
        sampler_logps_BT=per_token["sampler_logprobs"],
        old_logps_BT=per_token.get("old_logprobs"),
        ref_logps_BT=per_token.get("ref_logprobs"),
        kept_BT=per_token.get("kept"),
        log_left_BT=per_token.get("log_left"),
        teacher_logps_BT=teacher_logps_BT,
        teacher_ids_BTK=teacher_ids_BTK,
        teacher_top_BTK=teacher_top_BTK,
    )


def _places(sequence: TrainedSequence) -> torch.Tensor:
    places = sequence.model_places()
    return torch.arange(len(places)) if isinstance(places, range) else torch.tensor(places, dtype=torch.long)


def _advantages(micro_batch: MicroBatch, T: int) -> torch.Tensor:
    """(B,1), or (B,T) where advantages are of tokens."""
    if not any(isinstance(s.advantage, list) for s in micro_batch):
        return torch.tensor([s.advantage for s in micro_batch], dtype=torch.float32)[:, None]
    advantages_BT = torch.zeros((len(micro_batch), T))
    for i, s in enumerate(micro_batch):
        advantages_BT[i, : len(s.completion_ids)] = torch.tensor(s.advantage)
    return advantages_BT


def _of_teacher(
    micro_batch: MicroBatch, T: int, device: torch.device | str
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What a teacher elsewhere says, (B,T), or ids and log-probabilities of its likeliest tokens, (B,T,K)."""
    if micro_batch[0].teacher is None:
        return None, None, None
    B, said = len(micro_batch), [s.teacher or TeacherSays() for s in micro_batch]
    if micro_batch[0].teacher.top_ids is None:
        logps_BT = torch.zeros((B, T))
        for i, of in enumerate(said):
            logps_BT[i, : len(of.logprobs)] = torch.tensor(of.logprobs)
        return logps_BT.to(device), None, None
    K = max((len(ids) for of in said for ids in of.top_ids or []), default=1)
    ids_BTK = torch.full((B, T, K), -1)
    top_BTK = torch.zeros((B, T, K))
    for i, of in enumerate(said):
        for t, (ids, logprobs) in enumerate(zip(of.top_ids or [], of.top_logprobs or [], strict=True)):
            ids_BTK[i, t, : len(ids)] = torch.tensor(ids)
            top_BTK[i, t, : len(ids)] = torch.tensor(logprobs)
    return None, ids_BTK.to(device), top_BTK.to(device)


def _packed_row(
    micro_batch: MicroBatch, device: torch.device | str
) -> tuple[torch.Tensor, Layout, list[int], list[int]]:
    """(1,N) tokens and their layout; for each sequence the position that predicts its completion's first token (the end
    of its prompt) and the one that predicts its second. Those of later tokens follow the second one."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for i, s in enumerate(micro_batch):
        rows.setdefault(tuple(s.prompt_ids), []).append(i)
    input_ids = [token for prompt in rows for token in prompt]
    positions = [position for prompt in rows for position in range(len(prompt))]
    ends = list(accumulate(map(len, rows)))
    segments, groups = [0, *ends], [len(input_ids)]
    first_B, rest_B = [0] * len(micro_batch), [0] * len(micro_batch)
    for (prompt, of_prompt), end in zip(rows.items(), ends, strict=True):
        for i in of_prompt:
            first_B[i], rest_B[i] = end - 1, len(input_ids)
            read = micro_batch[i].completion_ids[:-1]  # the last token predicts nothing
            input_ids += read
            positions += range(len(prompt), len(prompt) + len(read))
            segments.append(len(input_ids))
        groups.append(len(input_ids))
    layout = Layout(
        segments=segments,
        groups=groups,
        segments_on_device=torch.tensor(segments, dtype=torch.int32, device=device),
        groups_on_device=torch.tensor([bound - groups[0] for bound in groups], dtype=torch.int32, device=device),
        position_ids_1N=torch.tensor([positions], device=device),
    )
    return torch.tensor([input_ids]), layout, first_B, rest_B


def _padded_rows(micro_batch: MicroBatch, pad_token_id: int) -> torch.Tensor:
    """(B,N) tokens, padded on the right: causal attention alone keeps padding out of everything that counts."""
    input_ids_BN = torch.full((len(micro_batch), max(map(len, micro_batch))), pad_token_id)
    for i, s in enumerate(micro_batch):
        input_ids_BN[i, : len(s)] = torch.tensor([*s.prompt_ids, *s.completion_ids])
    return input_ids_BN
