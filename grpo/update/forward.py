"""Forward passes before an update: statistics of tokens under the current policy, and selections based on them."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from grpo.config import AlgorithmConfig, TrainingConfig
from grpo.losses import StepTokens, find_loss, top_entropy_kept
from grpo.model.policy import Policy
from grpo.packing import MicroBatch, plan_micro_batches
from grpo.run.run import Run
from grpo.types import Group, TrainedSequence
from grpo.update.micro_batch_size import within_memory, work_through


class TokenStatistics(NamedTuple):
    """One completion's tokens, 0 at an environment's. ``log_left`` is the log of the probability that top-k, top-p and
    min-p leave."""

    logprobs: list[float]
    entropies: list[float]
    log_left: list[float]
    ref_logprobs: list[float] | None


def plan_for(
    policy: Policy, sequences: list[TrainedSequence], training: TrainingConfig, max_tokens: int
) -> list[list[MicroBatch]]:
    """Every process's micro-batches, as this policy computes them."""
    return plan_micro_batches(
        sequences,
        max_tokens=max_tokens,
        max_sequences=training.micro_batch_size,
        world_size=policy.accelerator.num_processes,
        packed=policy.packed,
    )


@torch.no_grad()
def sequence_statistics(run: Run, sequences: list[TrainedSequence], *, reference: bool) -> list[TokenStatistics]:
    """Statistics of each sequence's tokens under the policy (and the reference).

    Work is split over processes as in an update; every process gets all results.
    """
    policy, temperature = run.policy, run.recipe.rollout.temperature
    place_of = {id(s): i for i, s in enumerate(sequences)}

    def attempt(max_tokens: int) -> list[tuple[int, TokenStatistics]]:
        found = []

        def work(micro_batch: MicroBatch) -> None:
            batch = policy.collate(micro_batch)
            of_policy = policy.statistics(batch, temperature)
            ref_logps_BT = policy.reference_logprobs(batch, temperature) if reference else None
            for row, s in enumerate(micro_batch):
                if s.weight == 0:
                    continue
                span = slice(len(s.completion_ids))
                ref = ref_logps_BT[row, span].tolist() if ref_logps_BT is not None else None
                logprobs, entropies, log_left = (x_BT[row, span].tolist() for x_BT in of_policy[:3])
                found.append((place_of[id(s)], TokenStatistics(logprobs, entropies, log_left, ref)))

        plan = plan_for(policy, sequences, run.recipe.training, max_tokens)
        work_through(policy, plan[policy.accelerator.process_index], work)
        return found

    return [statistics for _, statistics in sorted(gather_object(within_memory(run, attempt)))]


def precompute_logprobs(
    run: Run, sequences: list[TrainedSequence], *, reference: bool, needed: list[TrainedSequence] | None = None
) -> list[TrainedSequence]:
    """The sequences with the rollout policy's log-probabilities (and the reference's), for several updates per rollout.
    With truncated sampling, ``log_left`` is set too. Those that no update needs (None: all do) stay as they are."""
    needed = sequences if needed is None else needed
    statistics = dict(zip(map(id, needed), sequence_statistics(run, needed, reference=reference), strict=True))
    return [_with(s, statistics[id(s)], run) if id(s) in statistics else s for s in sequences]


def _with(sequence: TrainedSequence, found: TokenStatistics, run: Run) -> TrainedSequence:
    return replace(
        sequence,
        old_logprobs=found.logprobs,
        ref_logprobs=found.ref_logprobs,
        log_left=found.log_left if run.policy.truncation else None,
    )


def with_sampler_as_old(sequences: list[TrainedSequence], groups: list[Group]) -> list[TrainedSequence]:
    """The sequences of ``groups``, G each. In replayed groups the sampler's log-probabilities become the old ones."""
    G = len(sequences) // len(groups)
    return [
        replace(sequence, old_logprobs=sequence.sampler_logprobs) if groups[i // G].replayed else sequence
        for i, sequence in enumerate(sequences)
    ]


def selects_tokens(algorithm: AlgorithmConfig) -> bool:
    """Does a token's part in the loss depend on the other tokens of the step?"""
    return algorithm.top_entropy_quantile < 1 or find_loss(algorithm.loss_type).select is not None


def select_tokens(run: Run, sequences: list[TrainedSequence]) -> list[TrainedSequence]:
    """``sequences``, which must all be valid, with ``kept`` set. It costs one more forward pass over the whole step.

    A random selection is keyed by the seed and the tokens, so it is the same on every process and on resume.
    """
    algorithm, seed = run.recipe.algorithm, run.recipe.training.seed
    statistics = sequence_statistics(run, sequences, reference=False)
    old = [s.old_logprobs or found.logprobs for s, found in zip(sequences, statistics, strict=True)]
    advantages = [
        s.advantage if isinstance(s.advantage, list) else [s.advantage] * len(s.completion_ids) for s in sequences
    ]
    logps_M, old_M, entropies_M, advantages_M = (
        torch.tensor([x_T[place] for s, x_T in zip(sequences, part, strict=True) for place in s.counted_places()])
        for part in ([of.logprobs for of in statistics], old, [of.entropies for of in statistics], advantages)
    )
    select = find_loss(algorithm.loss_type).select
    if select is None:
        kept_M = top_entropy_kept(entropies_M, algorithm.top_entropy_quantile)
    else:
        digest = zlib.crc32(repr([list(s.completion_ids) for s in sequences]).encode())
        generator = torch.Generator().manual_seed(seed << 32 | digest)
        kept_M = select(StepTokens(logps_M, logps_M - old_M, entropies_M, advantages_M), algorithm, generator)
    parts = kept_M.split([s.num_model_tokens - len(s.uncounted) for s in sequences])
    return [replace(s, kept=_of_all(kept_t.tolist(), s)) for s, kept_t in zip(sequences, parts, strict=True)]


def _of_all(kept: list[float], sequence: TrainedSequence) -> list[float]:
    """``kept`` of the tokens that count, with 0 at the others of the completion."""
    of_tokens = [0.0] * len(sequence.completion_ids)
    for place, value in zip(sequence.counted_places(), kept, strict=True):
        of_tokens[place] = value
    return of_tokens
