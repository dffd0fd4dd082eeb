"""Row lengths at which a model begins to compute otherwise: windows, chunks, the length that its rope was made for.

A check on rows shorter than these sees nothing of them. Where a recipe's rows may pass such a border, the checks at
start pass it too.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from grpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

NAMES = re.compile(r"window|chunk|block_size|original_max_position|attn_size|attention_size")  # of a border in a config
ROPE = re.compile("[Rr]otary|Ro[Pp][Ee]|^rope")  # in the name of a class; SolarOpenDecoderLayer is none
BEYOND = 8  # tokens behind a border that a check computes
FIXED = "fixed"  # transformers changes the frequencies of other types alone
SHORT = 8  # tokens whose rotary embeddings are compared


def past_borders(config: PreTrainedConfig, longest: int) -> int:
    """How long a row must be to pass every border that a row of ``longest`` tokens passes; 0 where it passes none."""
    passed = [border for border in _integers(config.get_text_config(decoder=True).to_dict()) if border < longest]
    return min(max(passed) + BEYOND, longest) if passed else 0


def _integers(values: dict[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and NAMES.search(name):
            yield value


def check_rope(causal_lm: PreTrainedModel, longest: int) -> None:
    """Refuse a model whose rotary embeddings would depend on the longest row of a batch.

    Two kinds do: ``longrope`` has other factors for rows beyond the length that it was made for, ``dynamic`` scales by
    the length. transformers chooses for all rows of a batch by its longest. So a short row beside a long one would be
    another model's, and one row would be computed otherwise while it is sampled than when it is whole. Where no row
    passes the border, the frequencies then stay as they are: checks compute longer rows, and ``dynamic`` remembers.

    Raises:
        UserError: rows of ``longest`` tokens, the longest of the recipe, pass the border.
    """
    for module in causal_lm.modules():
        for layer_type in _layer_types(module):
            if _moved(module, layer_type, longest):
                border = _last_unmoved(module, layer_type, longest)
                raise UserError(past_border(type(causal_lm).__name__, border, longest))
        _stay_short(module)


def _stay_short(module: nn.Module) -> None:
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):
        module.rope_type = dict.fromkeys(kinds, FIXED)
    elif isinstance(kinds, str) and ("dynamic" in kinds or kinds == "longrope"):
        module.rope_type = FIXED


def past_border(model: str, border: int, longest: int) -> str:
    return (
        f"data.max_prompt_length: prompt and completion may have {longest} tokens together. Beyond {border}, {model} "
        f"has other rotary frequencies for the whole batch, so a row's log-probabilities would depend on the rows "
        f"beside it. Lower data.max_prompt_length, or the max_completion_length of rollout and evaluation: to {border} "
        f"together"
    )


def _layer_types(module: nn.Module) -> list[str | None]:
    """For a module of rotary embeddings: the layer types that it has frequencies for, or None for all together."""
    if not ROPE.search(type(module).__name__):
        return []
    parameters = inspect.signature(module.forward).parameters
    if "position_ids" not in parameters:
        return []
    kinds = getattr(module, "rope_type", None)
    return list(kinds) if "layer_type" in parameters and isinstance(kinds, dict) else [None]


def _moved(module: nn.Module, layer_type: str | None, longest: int) -> bool:
    """Whether the embeddings of the first positions change when a row of ``longest`` tokens is in their batch."""
    if longest <= SHORT:
        return False
    alone, beside = (_embeddings(module, layer_type, [*range(SHORT), last]) for last in (SHORT - 1, longest - 1))
    return any(not torch.equal(a, b) for a, b in zip(alone, beside, strict=True))


def _last_unmoved(module: nn.Module, layer_type: str | None, longest: int) -> int:
    """The longest row that moves no embedding, by bisection."""
    low, high = SHORT, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _moved(module, layer_type, middle) else (middle, high)
    return low


@torch.no_grad()
def _embeddings(module: nn.Module, layer_type: str | None, positions: list[int]) -> list[torch.Tensor]:
    """What the module gives for the first positions; nothing where it wants other arguments. A copy computes it,
    because some modules remember the longest row that they have seen."""
    keywords = {} if layer_type is None else {"layer_type": layer_type}
    try:
        found = copy.deepcopy(module)(torch.zeros(1, 1, 1), position_ids=torch.tensor([positions]), **keywords)
    except Exception:  # a module of another kind with such a name; LogprobLM.check_body sees short borders all the same
        return []
    found = found if isinstance(found, tuple | list) else [found]
    return [tensor[:, :SHORT] for tensor in found]
