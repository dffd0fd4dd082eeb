"""Language consistency: the share of words in the target language (DeepSeek-R1, arXiv:2501.12948, section 2.3.2).

    reward = number of words in the target language / number of words

R1 counts the words of the thinking alone. Here the answer counts too, or words moved out of the tags would escape.

A word is a run of letters of one script; in scripts without spaces (Han, kana, Thai, …) every character is one. A word
belongs to the target language where its script does. Hence the limits:

- Languages of one script are not told apart: French passes for English, Chinese for Japanese (not the reverse).
- It says nothing about sense. ``the the the`` is good English; put ``repetition`` and an answer's reward beside it.
- Signs, digits and emoji are no words. In code (backticks) and formulas (``$…$``, ``\\(…\\)``, ``\\[…\\]``,
  ``\\command``) Latin letters are notation and do not count. Letters of other scripts count everywhere, except single
  Greek letters, which are notation too.
- A text without words is paid 0, so this reward does not fit thinking in digits alone.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from rewards.tags import ANSWER, END_ANSWER, END_THINK, THINK, text_of
from rewards.verdict import Outcome, Verdict, rewards_of

JUDGES = "shaping"

LATIN = "en de fr es it pt nl pl cs sv da no fi hu ro tr vi id latin"
SCRIPTS = {
    **{language: frozenset({"LATIN"}) for language in re.findall(r"\w+", LATIN)},
    **dict.fromkeys(("ru", "uk", "bg", "be", "cyrillic"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("ar", "fa", "ur", "arabic"), frozenset({"ARABIC"})),
    **dict.fromkeys(("hi", "mr", "ne", "devanagari"), frozenset({"DEVANAGARI"})),
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA"}),
    "ko": frozenset({"HANGUL"}),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "th": frozenset({"THAI"}),
    "bn": frozenset({"BENGALI"}),
    "ta": frozenset({"TAMIL"}),
    "te": frozenset({"TELUGU"}),
    "ka": frozenset({"GEORGIAN"}),
    "hy": frozenset({"ARMENIAN"}),
}
"""The scripts of each language, by the words with which Unicode's names of their letters begin."""

SPACELESS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"})
TAGS = re.compile("|".join((THINK, END_THINK, ANSWER, END_ANSWER)))
# Each alternative ends at the next mark of its kind or not at all, so that no text takes more than linear time.
NOTATION = re.compile(r"```[^`]*```|`[^`\n]*`|\$\$[^$]*\$\$|\$[^$\n]*\$|\\\([^\\\n]*\\\)|\\\[[^\\]*\\\]|\\[A-Za-z]+")
LATIN_LETTERS = re.compile(r"[A-Za-z]+")


def verify(completion: str, language: str = "en", *, prefill: str = "", status: str = "stop") -> Verdict:
    """Judge one completion by its share of words in ``language``: an ISO 639-1 code or a script that SCRIPTS lists.

    One cut off at ``"length"`` is worth 0, one that ended in ``"error"`` has no reward. Never raises on any text.

    Raises:
        ValueError: the language is not in SCRIPTS.
    """
    if language not in SCRIPTS:
        raise ValueError(f"language must be one of {', '.join(SCRIPTS)}, got {language!r}")
    if status == "error":
        return Verdict(Outcome.ERROR, "the completion was never finished")
    if status == "length":
        return Verdict(Outcome.TRUNCATED)
    words = list(scripts_of_words(prefill + completion))
    if not words:
        return Verdict(Outcome.NO_ANSWER, "no words")
    share = sum(script in SCRIPTS[language] for script in words) / len(words)
    if share == 1:
        return Verdict(Outcome.CORRECT)
    return Verdict(Outcome.WRONG, f"{share:.1%} of {len(words)} words are in {language}", share)


def language_reward(
    prompts: list[Any],
    completions: list[Any],
    status: list[str] | None = None,
    prefill: list[str] | None = None,
    *,
    language: str = "en",
    **kwargs: Any,
) -> list[float | None]:
    """The share of words in ``language``, 0 to 1. TRL's signature: lists with one entry a completion."""
    verdicts = [
        verify(text_of(completion), language, prefill=prefill_i, status=status_i)
        for completion, prefill_i, status_i in zip(
            completions, prefill or [""] * len(completions), status or ["stop"] * len(completions), strict=True
        )
    ]
    return rewards_of(verdicts, kwargs.get("log_verdict"))


def scripts_of_words(text: str) -> Iterator[str]:
    """The script of every word of a text, in order."""
    text = NOTATION.sub(lambda match: LATIN_LETTERS.sub(" ", match[0]), TAGS.sub(" ", text))
    current, length = "", 0
    for character in unicodedata.normalize("NFKC", text) + " ":
        script = _script(character)
        if script is None:  # a mark that belongs to the letter before it
            continue
        if script != current or script in SPACELESS:
            if current and not (current == "GREEK" and length == 1):
                yield current
            current, length = script, 0
        length += 1


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str | None:
    """``LATIN``, ``CJK``, …; "" if it is no letter, None for a mark on a letter."""
    category = unicodedata.category(character)
    if category[0] == "M" or category == "Cf":
        return None
    if category[0] != "L":
        return ""
    name = unicodedata.name(character, "")
    if "CJK" in name:  # "CJK UNIFIED IDEOGRAPH-4E2D" and its like
        return "CJK"
    return name.partition(" ")[0].partition("-")[0] or "UNNAMED"
