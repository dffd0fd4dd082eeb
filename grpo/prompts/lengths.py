"""Which rows have too many tokens, or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL_TOKENS = 4  # a tokenizer adds at most this many to a text (BOS, EOS, ...)


def longer_than(
    limit: int, texts: Mapping[int, str], tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], list[int]]
) -> dict[int, int]:
    """Rows whose text is longer than ``limit`` tokens, with its number of tokens.

    A token is at least one byte, so short texts need no counting. Longer texts are first counted in batches, which is
    fast; only those that may be too long are then encoded one by one by ``encode``.
    """
    suspects = [row for row, text in texts.items() if len(text.encode()) + SPECIAL_TOKENS > limit]
    found = {}
    for start in range(0, len(suspects), 1000):
        rows = suspects[start : start + 1000]
        counts = map(len, tokenizer([texts[row] for row in rows])["input_ids"])
        for row, count in zip(rows, counts, strict=True):
            if count + SPECIAL_TOKENS > limit and (tokens := len(encode(texts[row]))) > limit:
                found[row] = tokens
    return found


def without_tokens(texts: Mapping[int, str], encode: Callable[[str], list[int]], special: Collection[str]) -> list[int]:
    """Rows of whose text the tokenizer makes nothing: it is blank, or all of characters that the tokenizer drops. And
    rows of ``special`` tokens alone, which ask nothing.

    Any other text with one character that by itself makes a token is sound, and needs no encoding.
    """
    known, sizes = set(special), sorted({len(token) for token in special}, reverse=True)
    empty = {row for row, text in texts.items() if _all_special(text, known, sizes)}
    nothing = encode("")  # mostly nothing, or BOS
    sound = {character for text in texts.values() for character in text[:40]}
    sound = {character for character in sound if encode(character) != nothing}
    empty |= {row for row, text in texts.items() if sound.isdisjoint(text) and encode(text) == nothing}
    return [row for row in texts if row in empty]


def _all_special(text: str, special: set[str], sizes: list[int]) -> bool:
    """``sizes`` are the lengths of the special tokens, the longest first."""
    while text := text.lstrip():
        size = next((size for size in sizes if text[:size] in special), 0)
        if not size:
            return False
        text = text[size:]
    return True
