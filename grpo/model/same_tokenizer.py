"""Do two models mean the same by a token id? A teacher's log-probabilities are of the student's tokens."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from grpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("grpo")

SHOWN = 3  # differences in a message
CURE = (
    "Take a teacher of the same family, or distill through text: sample from the teacher and train with stage sft on "
    "what it says"
)
# Numbers, code, other scripts, spaces: where tokenizers of equal vocabularies may cut differently.
TEXTS = (
    "The answer is 1,234.5 + 67/8 = x^2; isn't it?  Two  spaces,\ttab\n\nand lines.",
    "def f(a, b):\n    return [a[i] for i in range(10)]  # comment\n",
    "Ein schöner Tag, déjà vu, Привет, 你好, 日本語, مرحبا, 🙂 e\u0301",
    "<think> so 12 * 3 = 36 </think> <answer> 36 </answer>",
)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Raise UserError, with what differs, unless ids, special tokens and the way texts are cut are the same.

    Another end-of-sequence token is warned of: both know both tokens, but the teacher ends its answers with its own.
    """
    if found := differences(student, teacher):
        shown = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
        raise UserError(
            f"teacher.name: the tokenizer of {name} is not the student's, so it can't judge the student's tokens: "
            f"{shown}. {CURE}"
        )
    if student.eos_token_id != teacher.eos_token_id:
        log.warning(
            "teacher: it ends a text with %s, the student with %s: the teacher will find the student's way of ending "
            "unlikely",
            teacher.eos_token,
            student.eos_token,
        )


def differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    """What differs, in words; empty where nothing does."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    found = []
    if only := sorted(ours.keys() - theirs.keys(), key=lambda token: ours[token]):
        found.append(f"{len(only)} tokens are the student's alone, the first {only[0]!r} ({ours[only[0]]})")
    if only := sorted(theirs.keys() - ours.keys(), key=lambda token: theirs[token]):
        found.append(f"{len(only)} tokens are the teacher's alone, the first {only[0]!r} ({theirs[only[0]]})")
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    if moved:
        first = min(moved, key=lambda token: ours[token])
        found.append(
            f"{len(moved)} tokens have other ids, the first {first!r}: {ours[first]} of the student, {theirs[first]} "
            "of the teacher"
        )
    specials = {token: (token in student.all_special_tokens, token in teacher.all_special_tokens) for token in ours}
    for token, (here, there) in specials.items():
        if here != there and not _is_eos_or_pad(token, student, teacher):
            found.append(f"{token!r} is a special token of the {'student' if here else 'teacher'} alone")
    for text in () if found else TEXTS:
        cut = [tokenizer.encode(text, add_special_tokens=False) for tokenizer in (student, teacher)]
        if cut[0] != cut[1]:
            place = next((i for i, (a, b) in enumerate(zip(*cut, strict=False)) if a != b), min(map(len, cut)))
            found.append(f"{text[:30]!r}… is cut into other tokens, from the {place + 1}th on")
    return found


def _is_eos_or_pad(token: str, *tokenizers: PreTrainedTokenizerBase) -> bool:
    """What pads counts nowhere, and of what ends a text there is a warning."""
    return any(token in (tokenizer.eos_token, tokenizer.pad_token) for tokenizer in tokenizers)
