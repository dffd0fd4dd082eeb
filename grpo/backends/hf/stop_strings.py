"""Strings that end a completion. Text is decoded only behind a token that could be the end of one."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"  # what a tokenizer makes of bytes that are not whole characters


CHARACTER = 4  # bytes of a character, at most


class StopStrings:
    """``ends(tokens)`` says whether the text of tokens holds a stop string, where their text without the last did not.

    The last token then holds the string's last character, or a part of its bytes.
    """

    def __init__(self, tokenizer: Any, strings: list[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.last_characters = {s[-1] for s in strings}
        self.longest = max(map(len, strings), default=0)
        # A token is a byte at least, mostly; those of the character in which the window begins come on top.
        self.window = max((len(s.encode()) for s in strings), default=0) + CHARACTER
        # Tidying up joins what stands before a token to it, so any token may complete a string.
        self.tidies = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        self._could_end: dict[int, bool] = {}

    def ends(self, token_ids: list[int]) -> bool:
        if not self.strings or not self._may_end(token_ids[-1]):
            return False
        last = self.tokenizer.decode(token_ids[-1:])
        size, enough = self.window, self.longest + len(last) + CHARACTER
        while True:
            tail = self.tokenizer.decode(token_ids[-size:])
            if self._holds(tail) or (REPLACEMENT in tail and self._holds_from_another_byte(token_ids, size)):
                return True
            if len(tail) >= enough or size >= len(token_ids):
                return False
            size *= 2  # some of the tokens have no text: those beyond the vocabulary, for one

    def _holds(self, text: str) -> bool:
        return any(s in text for s in self.strings)

    def _holds_from_another_byte(self, token_ids: list[int], size: int) -> bool:
        """Whether a window that begins at another byte of a character holds a string.

        Where bytes stand in for characters (``<0xE7>``), one that is cut makes all of those behind it unreadable.
        """
        longer = range(size + 1, min(size + CHARACTER, len(token_ids) + 1))
        return any(self._holds(self.tokenizer.decode(token_ids[-n:])) for n in longer)

    def _may_end(self, token: int) -> bool:
        if token not in self._could_end:
            # Twice, because some tokenizers drop the space before the first token of a text.
            text = self.tokenizer.decode([token, token])
            found = self.tidies or REPLACEMENT in text or not text or not self.last_characters.isdisjoint(text)
            self._could_end[token] = found
        return self._could_end[token]
