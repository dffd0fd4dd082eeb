"""Strings that end a completion. Text is decoded only behind a token that could be the end of one."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer makes of bytes that are not whole characters


class StopStrings:
    """``ends(tokens)`` says whether the text of tokens holds a stop string, where their text without the last did not.

    The last token then holds the string's last character, or a part of its bytes.
    """

    def __init__(self, tokenizer: Any, strings: list[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.last_characters = {s[-1] for s in strings}
        # A token is at least one character, or one of a character's 4 bytes.
        self.window = max(map(len, strings), default=0) + 4
        # Tidying up joins what stands before a token to it, so any token may complete a string.
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._could_end: dict[int, bool] = {}

    def ends(self, token_ids: list[int]) -> bool:
        if not self.strings or not self._may_end(token_ids[-1]):
            return False
        tail = self.tokenizer.decode(token_ids[-self.window :])
        return any(s in tail for s in self.strings)

    def _may_end(self, token: int) -> bool:
        if token not in self._could_end:
            # Twice, because some tokenizers drop the space before the first token of a text.
            text = self.tokenizer.decode([token, token])
            found = self.tidies or REPLACEMENT in text or not text or not self.last_characters.isdisjoint(text)
            self._could_end[token] = found
        return self._could_end[token]
