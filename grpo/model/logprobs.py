"""Log-probabilities and entropies of given tokens, from hidden states, without ever holding (N,V) logits.

Logits are the largest tensor of a language model's update: 16 sequences of 1,024 tokens over 152,000 words are 10 GB in
float32, before their gradient. Here they exist for one chunk of positions at a time. The backward pass computes each
chunk again and overwrites it by its gradient, g (onehot - p) / temperature. The first few chunks are kept instead of
computed again (all of them, as one, where they are that few). That is a constant amount, so memory does not grow with
tokens x vocabulary. Where entropies need a gradient, -p (log p + H) / temperature is added in the same pass; where a
teacher's distributions are compared with, so is the slope of their divergence.

Beside the matrix products, time goes into reading and writing memory. So each chunk is read once in the forward pass
and overwritten once in the backward pass, in tiles small enough that all work on a tile stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch

from grpo.model.devices import logit_sizes
from grpo.model.truncation import Truncation, truncate

Head = Callable[[torch.Tensor], torch.Tensor]


class Compared(Protocol):
    """What a teacher says at N positions: ``model.teacher`` makes them. Rows of a tile are at the positions ``at``."""

    def divergence(self, logps_rV: torch.Tensor, at: slice) -> torch.Tensor:
        """Of the student's log-probabilities from the teacher's, (r,)."""
        ...

    def slope(self, logps_rV: torch.Tensor, at: slice) -> torch.Tensor:
        """Its derivative by the student's logits, divided by the temperature; (r,V)."""
        ...


def token_statistics(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    parameters: Iterable[torch.Tensor] = (),
    entropy_gradient: bool = False,
    truncation: Truncation | None = None,
    teacher: Compared | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each target: its log-probability, the entropy of its distribution, the log of the probability that
    ``truncation`` leaves of that distribution, and its divergence from ``teacher``'s; float32 (N,), nats.

    ``hidden_NH`` are the last hidden states at the N positions that *predict* the targets (the position before each).
    ``head`` maps (n,H) to logits (n,V), row by row; ``parameters`` are those that ``head`` uses, which get gradients if
    they require them. Logits are divided by ``temperature``: the results describe the distribution that sampling at
    that temperature draws from. Entropies carry a gradient if ``entropy_gradient``. The third result has no gradient,
    and is 0 without truncation. A token's log-probability under truncated sampling is the first result minus the third.
    The fourth has a gradient, and is 0 without a teacher.
    """
    trained = [p for p in parameters if p.requires_grad]
    learns = torch.is_grad_enabled() and (hidden_NH.requires_grad or bool(trained))
    options = _Options(head, vocab_size, temperature, learns, entropy_gradient, truncation or Truncation(), teacher)
    return _TokenStatistics.apply(hidden_NH, targets_N, options, *trained)


class _Options(NamedTuple):
    head: Head
    vocab_size: int
    temperature: float
    learns: bool
    entropy_gradient: bool
    truncation: Truncation
    teacher: Compared | None


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, targets_N, options: _Options, *trained):
        head, vocab_size, temperature, learns, entropy_gradient, truncation, teacher = options
        device = hidden_NH.device.type
        sizes = logit_sizes(hidden_NH.device)
        N = len(targets_N)
        rows = max(1, N if learns and N * vocab_size <= sizes.kept else sizes.chunk // vocab_size)
        logps_N, entropy_N, normalizer_N = (hidden_NH.new_empty(N, dtype=torch.float32) for _ in range(3))
        log_left_N, divergence_N = (hidden_NH.new_zeros(N, dtype=torch.float32) for _ in range(2))
        kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # a chunk's input and logits, by its first position
        for start in range(0, N, rows):
            piece = slice(start, min(start + rows, N))
            keeps = learns and piece.stop * vocab_size <= sizes.kept
            with torch.set_grad_enabled(keeps):
                hidden_nH = hidden_NH[piece].detach().requires_grad_(keeps)
                logits_nV = head(hidden_nH)
            if keeps:
                kept[start] = hidden_nH, logits_nV
            for tile, buffer_rV in _tiles(logits_nV.detach(), sizes.tile):
                at = slice(start + tile.start, start + tile.stop)
                buffer_rV.copy_(logits_nV.detach()[tile]).div_(temperature)
                if truncation:
                    log_left_N[at] = truncate(buffer_rV, **truncation._asdict()).logsumexp(1)
                if teacher is not None:
                    divergence_N[at] = teacher.divergence(buffer_rV.log_softmax(1), at)
                logps_N[at], entropy_N[at], normalizer_N[at] = _measure(buffer_rV, targets_N[at])
            del hidden_nH, logits_nV
        if truncation:
            log_left_N = (log_left_N - normalizer_N).clamp(max=0.0)
        ctx.save_for_backward(hidden_NH, targets_N, normalizer_N, entropy_N, *trained)
        ctx.head, ctx.temperature, ctx.kept, ctx.rows, ctx.tile = head, temperature, kept, rows, sizes.tile
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.entropy_gradient, ctx.teacher = entropy_gradient, teacher
        without = [] if entropy_gradient else [entropy_N]
        without += [] if teacher is not None else [divergence_N]
        ctx.mark_non_differentiable(log_left_N, *without)
        return logps_N, entropy_N, log_left_N, divergence_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N, entropy_grad_N, _, divergence_grad_N):
        hidden_NH, targets_N, normalizer_N, entropy_N, *trained = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grads: list[torch.Tensor | None] = [None] * len(trained)
        scale_N = grad_N / ctx.temperature
        entropy_scale_N = entropy_grad_N / ctx.temperature if ctx.entropy_gradient else None
        divergence_scale_N = divergence_grad_N / ctx.temperature if ctx.teacher is not None else None
        for start in range(0, len(targets_N), ctx.rows):
            piece = slice(start, min(start + ctx.rows, len(targets_N)))
            hidden_nH, logits_nV = ctx.kept.pop(start, (None, None))
            if hidden_nH is None:
                with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                    hidden_nH = hidden_NH[piece].detach().requires_grad_()
                    logits_nV = ctx.head(hidden_nH)
            overwritten_nV = logits_nV.detach()
            for tile, buffer_rV in _tiles(overwritten_nV, ctx.tile):
                at = slice(start + tile.start, start + tile.stop)
                buffer_rV.copy_(overwritten_nV[tile]).div_(ctx.temperature)
                buffer_rV.sub_(normalizer_N[at, None])
                slope_rV = ctx.teacher.slope(buffer_rV, at) if divergence_scale_N is not None else None
                if entropy_scale_N is None:
                    buffer_rV.exp_().mul_(-scale_N[at, None])
                else:
                    factor_rV = (buffer_rV + entropy_N[at, None]).mul_(entropy_scale_N[at, None])
                    buffer_rV.exp_().mul_(factor_rV.add_(scale_N[at, None]).neg_())
                buffer_rV.scatter_add_(1, targets_N[at, None], scale_N[at, None])
                if slope_rV is not None:
                    buffer_rV.addcmul_(slope_rV, divergence_scale_N[at, None])
                overwritten_nV[tile] = buffer_rV
            # None for a parameter whose layer adds its gradient itself (kernels/grads_in_place.py).
            found = torch.autograd.grad(logits_nV, [hidden_nH, *trained], overwritten_nV, allow_unused=True)
            grad_hidden_NH[piece] = found[0]
            for i, grad in enumerate(found[1:]):
                grads[i] = grad if grads[i] is None else grads[i].add_(grad)
            del hidden_nH, logits_nV, overwritten_nV, found
        if len(targets_N) == 0:  # DDP waits for a gradient all the same
            grads = [torch.zeros_like(parameter) for parameter in trained]
        return grad_hidden_NH, None, None, *grads


def _measure(logits_rV: torch.Tensor, targets_r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities, entropies and log normalizers of rows of float32 logits, which are overwritten."""
    largest_r1 = logits_rV.amax(1, keepdim=True)
    logits_rV.sub_(largest_r1)
    target_r = logits_rV.gather(1, targets_r[:, None])[:, 0]
    weights_rV = logits_rV.exp()
    sum_r = weights_rV.sum(1)
    mean_r = weights_rV.mul_(logits_rV).sum(1) / sum_r  # H = log Z - E[logit]
    return target_r - sum_r.log(), sum_r.log() - mean_r, sum_r.log() + largest_r1[:, 0]


def _tiles(logits_nV: torch.Tensor, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a chunk in tiles, each with a float32 buffer of its size."""
    n, V = logits_nV.shape
    rows = min(n, max(1, size // V))
    buffer_rV = torch.empty((rows, V), dtype=torch.float32, device=logits_nV.device)
    for start in range(0, n, rows):
        tile = slice(start, min(start + rows, n))
        yield tile, buffer_rV[: tile.stop - tile.start]
