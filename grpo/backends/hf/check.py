"""Whether the engine can decode a model: it decodes a few tokens beside the model's own forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
import transformers
from transformers import PreTrainedModel

from grpo.backends.hf.attention import decoding_into, implementation_of
from grpo.backends.hf.buffers import Prefill
from grpo.backends.hf.engine import NextLogits
from grpo.backends.hf.extension import extend
from grpo.backends.hf.kv_cache import DecodeCache, Shape
from grpo.errors import UserError, first_line
from grpo.model.logprob_lm import LogprobLM

log = logging.getLogger("grpo")

STATEFUL, CAN_SET = "_is_stateful", "_can_set_attn_implementation"  # private names of transformers': they may be gone
PROMPT_LENGTHS = (40, 21, 33)  # too long for sequences to begin with a copy
PROMPT_OF = (0, 1, 0, 2, 1)  # of each sequence
# More than needed: a graph computes all.
ROOM = Shape(prompts=5, prompt_tokens=40, sequences=6, sequence_tokens=80, group_size=3)
STEPS = 4
EXTENDED_BY = (3, 1, 5, 2, 4)  # tokens, of each sequence: answers of an environment, before the last step
NO_LIMIT = 1 << 30
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # share of the logits' range

Around = Callable[[], AbstractContextManager]  # what a rollout's passes run within


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention the backend can't replace, by what transformers says of it.

    transformers says it in private names. Where one is missing, a line in the log says so, and ``check_decoding``
    finds such models later. Models with a recurrent state do not come here (``own_cache.keeps_state``).

    Raises:
        UserError: the model does not attend through transformers' attention interface.
    """
    stateful, can_set = (getattr(model, name, None) for name in (STATEFUL, CAN_SET))
    if stateful is None or can_set is None:
        log.warning(
            "decoding: transformers %s does not say whether a model keeps a recurrent state or can be given another "
            "attention; decoding a few tokens has to show it",
            transformers.__version__,
        )
    if can_set is not None and not can_set():
        raise UserError(
            f"model.name: {type(model).__name__} does not attend through transformers' attention interface, which the "
            "hf backend needs; use rollout.backend: vllm or another model"
        )
    implementation_of(model)


@torch.no_grad()
def check_decoding(
    model: LogprobLM,
    device: torch.device,
    step: NextLogits,
    beyond: int = 0,
    longest: int = NO_LIMIT,
    around: Around = nullcontext,
    *,
    turns: bool = False,
) -> None:
    """Compare the engine's logits with the model's own on a few made-up tokens, and on a row of ``beyond`` tokens,
    which passes the model's windows. None is longer than ``longest``. The engine decodes within ``around``. With
    ``turns``, sequences also get several tokens at once, as an environment's answers come.

    Raises:
        UserError: they differ.
    """
    answers = EXTENDED_BY if turns else (0,) * len(PROMPT_OF)
    lengths = prompt_lengths(PROMPT_LENGTHS, beyond, longest - max(answers))
    ids = made_up_ids(model, device, lengths)
    cache = DecodeCache(replace(ROOM, prompt_tokens=max(lengths)), device)
    difference, size = 0.0, 0.0
    with around(), decoding_into(model.causal_lm, cache), known_failures(model):
        _prefill(model, cache, ids, lengths)
        decoded = [step(_tokens_at(ids, t, lengths), cache).clone() for t in range(STEPS - 1)]
        if turns:
            decoded.append(_extend(model, cache, ids, lengths))
        decoded.append(step(_tokens_at(ids, STEPS - 1, lengths, answers), cache).clone())
    for place, prompt in enumerate(PROMPT_OF):
        end = lengths[prompt] + STEPS + answers[place]
        kept = [*range(end - answers[place] - STEPS, end - answers[place] - 1), *([end - 2] if turns else []), end - 1]
        own = model.causal_lm(input_ids=ids[place, :end][None], use_cache=False).logits[0, kept].float()
        ours = torch.stack([logits_BV[place] for logits_BV in decoded]).float()
        difference = max(difference, float((ours - own).abs().max()))
        size = max(size, float(own.max() - own.min()))
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else model.causal_lm.dtype
    if not difference <= TOLERANCE.get(dtype, 0.05) * max(size, 1e-3):
        raise UserError(
            f"model.name: {type(model.causal_lm).__name__} decodes to other logits in the hf backend than its own "
            f"forward pass has (by {difference:.3g}; they range over {size:.3g}), so its layers do something "
            "the backend does not know; use rollout.backend: vllm"
        )


@contextmanager
def known_failures(model: LogprobLM) -> Iterator[None]:
    """A model may raise anything where it is not decoded as it expects; the message says what to do."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"model.name: {type(model.causal_lm).__name__} can't be decoded by the hf backend ({type(error).__name__}: "
            f"{first_line(error)}); use rollout.backend: vllm"
        ) from error


@torch.no_grad()
def cache_bytes(model: LogprobLM, device: torch.device) -> int:
    """Bytes of one token's keys and values, over all layers. A prompt of one token is computed to find out."""
    cache = DecodeCache(Shape(prompts=1, prompt_tokens=1, sequences=1, sequence_tokens=1, group_size=1), device)
    with decoding_into(model.causal_lm, cache):
        cache.prefill = Prefill([(0, cache.add_prompt(1), 1)])
        model.body(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), use_cache=False)
    return sum(layer.token_bytes() for layer in cache.layers.values())


def prompt_lengths(lengths: tuple[int, ...], beyond: int, longest: int) -> tuple[int, ...]:
    """The lengths of prompts, the first so long that decoding reaches ``beyond``, and none with more than ``longest``
    tokens in the end."""
    wanted = max(lengths[0], beyond - STEPS), *lengths[1:]
    return tuple(max(1, min(length, longest - STEPS)) for length in wanted)


def made_up_ids(model: LogprobLM, device: torch.device, lengths: tuple[int, ...] = PROMPT_LENGTHS) -> torch.Tensor:
    """Tokens (sequences, at least longest prompt + STEPS). Sequences of one prompt begin with the same."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    width = max(64, max(lengths) + STEPS + max(EXTENDED_BY))
    ids = torch.arange(len(PROMPT_OF) * width, device=device).view(len(PROMPT_OF), width) * 7 % (vocab - 1)
    for place, prompt in enumerate(PROMPT_OF):
        ids[place, : lengths[prompt]] = ids[PROMPT_OF.index(prompt), : lengths[prompt]]
    return ids


def _prefill(model: LogprobLM, cache: DecodeCache, ids: torch.Tensor, lengths: tuple[int, ...]) -> None:
    cache.prefill = Prefill([(row, cache.add_prompt(length), length) for row, length in enumerate(lengths)])
    first = [PROMPT_OF.index(prompt) for prompt in range(len(lengths))]
    model.body(input_ids=ids[first, : max(lengths)], use_cache=False)
    cache.prefill = None
    cache.begin_sequences([cache.add_sequence(prompt) for prompt in PROMPT_OF])  # with a copy of a short prompt


def _tokens_at(
    ids: torch.Tensor, t: int, lengths: tuple[int, ...], answers: tuple[int, ...] = (0,) * len(PROMPT_OF)
) -> torch.Tensor:
    """The t-th tokens (sequences,) behind the prompts and ``answers``."""
    places = enumerate(zip(PROMPT_OF, answers, strict=True))
    return torch.stack([ids[place, lengths[prompt] + more + t] for place, (prompt, more) in places])


def _extend(model: LogprobLM, cache: DecodeCache, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The logits (sequences,V) behind the answers of all sequences, which came behind all steps but the last."""
    starts = [lengths[prompt] + STEPS - 1 for prompt in PROMPT_OF]
    tokens = [ids[p, start : start + EXTENDED_BY[p]].tolist() for p, start in enumerate(starts)]
    return extend(model, cache, list(range(len(starts))), tokens).clone()
