"""How many tokens one forward and backward pass may have: as the recipe says, or as memory allows.

Without ``training.micro_batch_tokens`` the size is found before the first update: a share of the free memory, divided
by the bytes that a token keeps for the backward pass, as measured on made-up sequences. If memory runs out all the
same, on any process, the size is halved and the step repeated. Denominators are those of the whole step, so its
gradient is the same.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from grpo.errors import RunError
from grpo.kernels import measure_kept
from grpo.model.device_memory import free_memory
from grpo.model.devices import largest_micro_batch
from grpo.model.policy import Policy
from grpo.packing import MicroBatch, packed_tokens, padded_tokens
from grpo.run.run import Run
from grpo.types import TrainedSequence

log = logging.getLogger("grpo")
Result = TypeVar("Result")

SMALLEST = 256
SHARE = 0.5  # of free memory: the backward pass's temporary tensors are at most as large again
MEASURED_TOKENS = (128, 384)


class DoesNotFit(Exception):
    """A micro-batch of ``sequences`` and ``tokens`` ran out of memory on process ``rank``. Raised on all processes."""

    def __init__(self, sequences: int, tokens: int, rank: int = 0):
        super().__init__(f"a micro-batch of {tokens} tokens ({sequences} sequences)")
        self.sequences, self.tokens, self.rank = sequences, tokens, rank


def within_memory(run: Run, attempt: Callable[[int], Result]) -> Result:
    """``attempt(max_tokens)``; on DoesNotFit, halve ``max_tokens`` and retry, on all processes.

    Raises RunError where a single sequence does not fit.
    """
    policy, progress, given = run.policy, run.progress, run.recipe.training.micro_batch_tokens
    if given is None and progress.micro_batch_limit is None:
        progress.micro_batch_limit = automatic_size(policy)
    while True:
        tokens = min(size for size in (given, progress.micro_batch_limit) if size is not None)
        try:
            return attempt(tokens)
        except DoesNotFit as error:
            what, sequences, halved = str(error), error.sequences, min(tokens, error.tokens) // 2
            where = f"rank {error.rank}: " if policy.accelerator.num_processes > 1 else ""
        policy.optimizer.zero_grad(set_to_none=True)
        if sequences == 1:
            raise RunError(
                f"{where}out of memory in {what}: a single sequence does not fit. Set "
                "model.gradient_checkpointing=true, or lower rollout.max_completion_length or data.max_prompt_length; "
                "then go on with --resume"
            )
        progress.micro_batch_limit = halved
        if policy.accelerator.is_main_process:
            log.warning("%sout of memory in %s: begun again with training.micro_batch_tokens=%d", where, what, halved)


def work_through(policy: Policy, micro_batches: list[MicroBatch], work: Callable[[MicroBatch], None]) -> None:
    """``work(micro_batch)`` for each of this process's micro-batches: a pass through the policy and what goes with it.

    Raises DoesNotFit on all processes, after the last micro-batch, if memory ran out on any. All processes call this,
    with as many micro-batches.
    """
    failed: DoesNotFit | None = None
    for micro_batch in micro_batches:
        if failed is None:
            failed = _does_not_fit(policy, micro_batch, work)
        elif policy.collectives is not None:  # the others still gather weights in theirs
            policy.collectives.begin()
            work(_smallest(micro_batch))
    if policy.accelerator.num_processes > 1:
        failed = _any(policy, failed)
    if failed is not None:
        raise failed


def _does_not_fit(policy: Policy, micro_batch: MicroBatch, work: Callable[[MicroBatch], None]) -> DoesNotFit | None:
    if policy.collectives is not None:
        policy.collectives.begin()
    try:
        work(micro_batch)
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not within the except clause: its traceback holds the tensors that did not fit.
    policy.end_pass()
    gc.collect()
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
    if policy.collectives is not None:  # the others wait in this pass
        policy.collectives.begin(skipped=policy.collectives.joined)
        work(_smallest(micro_batch))
    tokens_of = packed_tokens if policy.packed else padded_tokens
    return DoesNotFit(len(micro_batch), tokens_of(micro_batch), policy.accelerator.process_index)


def _any(policy: Policy, mine: DoesNotFit | None) -> DoesNotFit | None:
    """The smallest micro-batch that did not fit on any process; the same on every process."""
    sizes = [mine.sequences, mine.tokens] if mine is not None else [0, 0]
    found_W2 = policy.accelerator.gather(torch.tensor([sizes], device=policy.device)).tolist()
    failed = [DoesNotFit(sequences, tokens, rank) for rank, (sequences, tokens) in enumerate(found_W2) if sequences]
    return min(failed, key=lambda one: (one.sequences > 1, one.tokens), default=None)


def _smallest(micro_batch: MicroBatch) -> MicroBatch:
    """A micro-batch of two tokens and no weight, with the same fields."""
    one = min(micro_batch, key=len)
    per_token = ("completion_ids", "sampler_logprobs", "old_logprobs", "ref_logprobs", "kept", "log_left")
    cut = {name: getattr(one, name)[:1] for name in per_token if getattr(one, name) is not None}
    cut["advantage"] = one.advantage[:1] if isinstance(one.advantage, list) else one.advantage
    teacher = None if one.teacher is None else one.teacher.first()
    return [
        replace(one, prompt_ids=one.prompt_ids[:1], weight=0.0, uncounted=(), environment=(), teacher=teacher, **cut)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises an error of its own for accelerators, and for main memory a RuntimeError with a message."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "bad_alloc")
    )


def automatic_size(policy: Policy) -> int:
    """The size that memory allows: a power of two, the same on every process, logged. Called by all processes."""
    kept = kept_per_token(policy)
    free = free_memory(policy.device) - _still_to_come(policy)
    fits = SHARE * free / kept
    largest = largest_micro_batch(policy.device, kept)
    mine = torch.tensor([min(max(fits, 1), largest)], device=policy.device)
    tokens = 1 << (int(policy.accelerator.gather(mine).min()).bit_length() - 1)
    if policy.accelerator.is_main_process:
        log.info(
            "training.micro_batch_tokens: %d (a token keeps %.0f kB for the backward pass, %.1f GB are free%s)",
            max(tokens, SMALLEST),
            kept / 1e3,
            free / 1e9,
            "; more would not be faster" if fits >= largest else "",
        )
    return max(tokens, SMALLEST)


def kept_per_token(policy: Policy) -> float:
    """Bytes per token that a forward pass keeps for the backward pass. Two lengths are compared: the weights cancel."""
    few, many = (_kept(policy, tokens) for tokens in MEASURED_TOKENS)
    return max(many - few, 1) / (MEASURED_TOKENS[1] - MEASURED_TOKENS[0])


def _kept(policy: Policy, tokens: int) -> int:
    """Bytes kept by a forward pass over one made-up sequence; over several where the model has fewer positions."""
    config = policy.causal_lm.config.get_text_config(decoder=True)
    rows = -(-tokens // (getattr(config, "max_position_embeddings", None) or tokens))
    length = tokens // rows
    made_up = [[(row * length + i) % config.vocab_size for i in range(length)] for row in range(rows)]
    prompt = length // 4
    batch = policy.collate(
        [TrainedSequence(ids[:prompt], ids[prompt:], [0.0] * (length - prompt), 1.0) for ids in made_up]
    )
    kept = measure_kept(lambda: policy.logprobs(batch, 1.0)[0])
    policy.end_pass()
    return kept


def _still_to_come(policy: Policy) -> int:
    """Bytes of gradients and, before the first step, of AdamW's two moments."""
    trained = sum(p.numel() * p.element_size() for p in policy.model.parameters() if p.requires_grad)
    return trained * (1 if policy.optimizer.state else 3)
