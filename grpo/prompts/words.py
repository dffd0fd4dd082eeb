"""Texts as the words by which they are compared, whatever their case, punctuation and spacing, and these as arrays."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

RUN = 8  # words of which runs consist
SAMPLE = 20_000  # texts by which templates are known: more would tell nothing else

_BASE = np.uint64(0x9E3779B97F4A7C15)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_POWERS = str.maketrans(
    {power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
)
_OPERATORS = "-+*/=<>^"
_WORD = re.compile(r"\d+|[^\W\d_]+|[-+*/=<>^](?=\s*(?:[-+]?\d|[({]|[^\W\d_]\b))")
_LATEX = [
    (re.compile(r"\\(?:cdot|times|ast)(?![a-z])"), "*"),
    (re.compile(r"\\div(?![a-z])"), "/"),
    (re.compile(r"\\leq?(?:slant)?(?![a-z])"), "<="),
    (re.compile(r"\\geq?(?:slant)?(?![a-z])"), ">="),
    (re.compile(r"\\[dt]frac(?![a-z])"), r"\\frac"),
    (
        re.compile(
            r"\\(?:[,;:!> ]|(?:q?quad|left|right|displaystyle|limits|bigg?[lr]?|text(?:bf|it|rm)?|math(?:rm|bf|it)|"
            r"mbox|operatorname)(?![a-z]))|[$~&]"
        ),
        " ",
    ),
]


def words(text: str) -> list[str]:
    """The words of a text as they are compared: of letters or of digits, and signs that stand before a number, a
    bracket or a variable. Without case, punctuation and spacing, also LaTeX's."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_POWERS)).replace("\u2044", "/")  # of \u00bd
        text = _CJK.sub(r" \g<0> ", text)  # these are written without spaces
    text = text.casefold()
    if "\\" in text or "$" in text or "~" in text:
        for pattern, plain in _LATEX:
            text = pattern.sub(plain, text)
    return _WORD.findall(text)


# --- texts as arrays -------------------------------------------------------------------------------------------------


class Vocabulary:
    """Words as numbers, with a hash of each; ``numbers`` says which are numbers."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.words: list[str] = []

    def of(self, found: list[str]) -> list[int]:
        ids = self.ids
        for word in found:
            if word not in ids:
                ids[word] = len(ids)
                self.words.append(word)
        return [ids[word] for word in found]

    def hashes(self) -> np.ndarray:
        digests = b"".join(
            hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest() for word in self.words
        )
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)

    def numbers(self) -> np.ndarray:
        return np.array([is_number(word) for word in self.words], dtype=bool)


class Texts:
    """Different texts as arrays: the words of all, one after the other, and where each begins. ``rows_of`` are the rows
    that have a text. What stands in more than ``most`` of them, ``least`` or their ``share``, is a template's."""

    def __init__(self, rows: Sequence[str], vocabulary: Vocabulary, *, least: int, share: float) -> None:
        self.vocabulary = vocabulary
        self.text_of: dict[bytes, int] = {}
        self.rows_of: list[list[int]] = []
        kept: list[np.ndarray] = []
        for row, text in enumerate(rows):
            ids = np.array(vocabulary.of(words(text)), dtype=np.int32)
            if not len(ids):
                continue
            place = self.text_of.setdefault(ids.tobytes(), len(kept))
            if place == len(kept):
                kept.append(ids)
                self.rows_of.append([])
            self.rows_of[place].append(row)
        self.ids = np.concatenate(kept) if kept else np.zeros(0, dtype=np.int32)
        sizes = np.array([len(ids) for ids in kept], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.text = np.repeat(np.arange(len(kept)), sizes)
        self.most = max(least, share * len(kept))

    def __len__(self) -> int:
        return len(self.rows_of)

    def span(self, text: int) -> np.ndarray:
        return self.ids[self.starts[text] : self.starts[text + 1]]

    def words(self, text: int, start: int = 0, end: int | None = None) -> list[str]:
        return [self.vocabulary.words[i] for i in self.span(text)[start:end]]

    def runs(self) -> np.ndarray:
        """The places at which RUN words of one text begin."""
        if len(self.ids) < RUN:
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(self.text[: len(self.ids) - RUN + 1] == self.text[RUN - 1 :])

    def sample(self) -> Texts:
        """At most SAMPLE of the texts, evenly spread."""
        if len(self) <= SAMPLE:
            return self
        chosen = np.linspace(0, len(self) - 1, SAMPLE).astype(np.int64)
        part = Texts([], self.vocabulary, least=0, share=0)
        part.rows_of = [self.rows_of[i] for i in chosen]
        part.ids = np.concatenate([self.span(int(i)) for i in chosen])
        sizes = np.diff(self.starts)[chosen]
        part.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        part.text = np.repeat(np.arange(len(chosen)), sizes)
        part.most = self.most * SAMPLE / len(self)
        return part


def run_hashes(hash_of: np.ndarray, texts: Texts, places: np.ndarray, open_place: int | None = None) -> np.ndarray:
    """Hashes of the RUN words that begin at these places; one of the words may be left open."""
    values, hashes = hash_of[texts.ids], np.zeros(len(places), dtype=np.uint64)
    for place in range(RUN):
        hashes *= _BASE
        if place != open_place:
            hashes += values[places + place]
    return hashes


def counted(wanted: np.ndarray, hashes: np.ndarray, text: np.ndarray) -> np.ndarray:
    """In how many different texts each wanted hash stands. ``wanted`` is sorted; ``text`` says where a hash is from."""
    if not len(wanted) or not len(hashes):
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    hit = wanted[place] == hashes
    pairs = np.unique(place[hit].astype(np.int64) << 32 | text[hit])
    return np.bincount(pairs >> 32, minlength=len(wanted))


def among(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Which values are among the wanted ones, which are sorted; quicker than ``np.isin`` where these are few."""
    if not len(wanted):
        return np.zeros(len(values), dtype=bool)
    return wanted[np.minimum(np.searchsorted(wanted, values), len(wanted) - 1)] == values


def is_number(word: str) -> bool:
    """Whether a word is of digits, or a sign."""
    return word[0].isdecimal() or word in _OPERATORS
