"""The text of a completion as reward functions see it: without the tokens that only mark ends and turns.

A tokenizer may hold ``<think>`` or ``<answer>`` as special tokens. A decoder that leaves out all special tokens hides
them from the reward, which then finds no answer in a perfect completion. So only those are left out that no reward
could ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""The tags of the built-in formats. They are text, whatever the tokenizer calls them and does with them."""
TURNS = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]


class CompletionText:
    """``of(token_ids)`` is the text. Left out are the tokens that end a completion, the tokenizer's own (padding,
    beginning, end, unknown), and those that its chat template puts around turns. Tags stay even then, and so do all
    other special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        special = special_tokens(tokenizer)
        marks, tags = _marks(tokenizer, set(special.values()))
        ends = set(stop_token_ids)
        self.left_out = {i for i, text in special.items() if text not in tags and (i in ends or text in marks)}
        self.kept = {text for i, text in special.items() if i not in self.left_out}

    def of(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([token for token in token_ids if token not in self.left_out]))


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Every token that ``skip_special_tokens`` would leave out: its id and text."""
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _marks(tokenizer: Any, special: set[str]) -> tuple[set[str], set[str]]:
    """Special tokens that have a role in the tokenizer, or around turns; and those that are tags, though a template may
    show them: those that come in pairs (``[THINK]``, ``[/THINK]``) and do not enclose what a turn says (``[INST]``)."""
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    own = {text for name in names if (text := getattr(tokenizer, name, None))}
    pairs = {opens: closes for closes in special - own if (opens := closes.replace("/", "", 1)) in special - {closes}}
    shown = _turns(tokenizer)
    around = {tag for pair in pairs.items() if re.search(r"\s*x\s*".join(map(re.escape, pair)), shown) for tag in pair}
    tags = {*pairs, *pairs.values()} - around
    return own | {text for text in special if text in shown}, tags.union(TAGS)


def _turns(tokenizer: Any) -> str:
    """What the chat template shows of ``TURNS``, but not how it begins an answer: what only stands there is text."""
    if not tokenizer.chat_template:
        return ""
    from grpo.prompts.templates import render

    try:
        return render(TURNS, tokenizer)
    except Exception:  # a template that fails marks nothing; where it is used, it is refused
        return str(tokenizer.chat_template)
