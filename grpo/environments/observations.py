"""What an environment says, as the tokens that stand between two turns of the model.

With ``template: chat`` they are what the tokenizer's own chat template writes from the end of an assistant's turn to
the beginning of the next one, found in a conversation of dummies. Otherwise they are plain text. The model's own tokens
are never tokenized again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from grpo.config import Source
from grpo.errors import UserError
from grpo.prompts.answers import PLAIN, WRAPPED, encode_behind
from grpo.prompts.completion_text import special_tokens
from grpo.prompts.templates import TemplateHangs, render

log = logging.getLogger(__name__)

Result = tuple[str, str]  # a tool's name, and what it says
DUMMIES = ("qxzq", "vkjw")
MARKS = ("\n[... {} characters left out ...]\n", " ... ", "")
CHARACTERS = 16  # that a token has at most, or the search for the longest text that fits begins too low


class Fitted(NamedTuple):
    """The tokens of an answer, and whether something of it was left out."""

    tokens: list[int]
    cut: bool


class Observations:
    """``of_results`` and ``of_text`` give the tokens for tools and for a game, at most ``limit`` of them.

    ``most_results`` is how many results of tools fit into one answer. ``chat``: the prompts are the chat template's.

    Raises:
        UserError: the chat template has no place for them, or ``limit`` is too low.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        stop_token_ids: Collection[int],
        form: str,
        limit: int,
        *,
        chat: bool,
        game: bool,
    ) -> None:
        self.tokenizer, self.form, self.limit = tokenizer, form, limit
        self._stops = frozenset(stop_token_ids)
        self._special = _finder_of_special(tokenizer)
        self._chat = _Chat(source, tokenizer, form, game=game) if chat else None
        self.mark = next(mark for mark in MARKS if 4 * self._length(mark.format(1000)) <= limit or not mark)
        empty = (lambda n: self._text("", None)) if game else (lambda n: self._results([("tool", "")] * n, None))
        need = len(empty(1)) + self._length(self.mark.format(1000)) + 1
        if need > limit:
            raise UserError(
                f"environment.max_observation_length: {limit} tokens are too few: take {need} at least, since "
                f"{need - 1} stand around an answer and mark one that is cut"
            )
        self.most_results = 1
        while not game and self.most_results < limit and len(empty(self.most_results + 1)) <= limit // 2:
            self.most_results += 1

    def of_results(self, results: Sequence[Result], last_token: int) -> Fitted:
        """The tokens behind a turn whose last one is ``last_token``, from what its calls came to."""
        names = [name for name, _ in results]
        return self._fitted(
            [text for _, text in results],
            lambda texts: self._results(list(zip(names, texts, strict=True)), last_token),
        )

    def of_text(self, text: str, last_token: int) -> Fitted:
        """The tokens behind a turn of a game."""
        return self._fitted([text], lambda texts: self._text(texts[0], last_token))

    def _results(self, results: Sequence[Result], last_token: int | None) -> list[int]:
        if self._chat is not None:
            return self._chat.tokens_of_results(results, ended=last_token in self._stops)
        return encode_behind(
            self.tokenizer, PLAIN.format("\n".join(WRAPPED[self.form].format(text) for _, text in results))
        )

    def _text(self, text: str, last_token: int | None) -> list[int]:
        if self._chat is not None:
            return self._chat.tokens([{"role": "user", "content": text}], ended=last_token in self._stops)
        return encode_behind(self.tokenizer, PLAIN.format(text))

    def _fitted(self, texts: list[str], tokens_of: Callable[[list[str]], list[int]]) -> Fitted:
        """The tokens of texts, each of which has its middle left out where they are too many: of all as many characters
        as fit."""
        texts = [self._harmless(text) for text in texts]
        longest = max(map(len, texts), default=0)
        if longest <= self.limit * CHARACTERS:
            found = tokens_of(texts)
            if len(found) <= self.limit:
                return Fitted(found, cut=False)
        low, high = 0, min(longest, self.limit * CHARACTERS)
        best = tokens_of([""] * len(texts))
        while low < high:
            middle = (low + high + 1) // 2
            found = tokens_of([self._cut(text, middle) for text in texts])
            if len(found) <= self.limit:
                low, best = middle, found
            else:
                high = middle - 1
        return Fitted(best, cut=True)

    def _cut(self, text: str, characters: int) -> str:
        """At most so many characters of a text, and the mark."""
        if len(text) <= characters:
            return text
        head = (characters + 1) // 2
        tail = characters - head
        return text[:head] + self.mark.format(len(text) - characters) + (text[-tail:] if tail else "")

    def _harmless(self, text: str) -> str:
        """A text that holds no special token: it could end the environment's turn and begin one of the model's. A space
        breaks it up. Halves of characters become question marks."""
        text = text.encode("utf-8", "replace").decode()
        return self._special.sub(lambda found: f"{found.group()[0]} {found.group()[1:]}", text)

    def _length(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


def _finder_of_special(tokenizer: Any) -> re.Pattern[str]:
    """Finds special tokens in a text. Those of one character are characters."""
    texts = sorted({text for text in special_tokens(tokenizer).values() if len(text) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) if texts else r"(?!)")


class _Chat:
    """What the chat template writes behind a turn of the model. ``role`` is that of what tools say: ``tool``, or
    ``user`` where the template knows no tools."""

    def __init__(self, source: Source, tokenizer: Any, form: str, *, game: bool) -> None:
        self.tokenizer, self.form = tokenizer, form
        self.key, self.date = f"{source.where}.template", source.rows.chat_template_date
        self.kwargs = source.rows.chat_template_kwargs
        self.role = "user" if game else "tool"
        if not game and not (_knows_tools(tokenizer) and self._has_place("tool")):
            self.role = "user"
            log.warning(
                "%s: the tokenizer's chat template knows no tools. What they say is given as the user's messages; tell "
                "the model in data.system_prompt or in the prompts which there are and how to call them",
                self.key,
            )
        if not self._has_place(self.role):
            raise UserError(
                f"{self.key}: the tokenizer's chat template does not show a message of the role {self.role} behind the "
                "assistant's, so no environment could answer; take another template or tokenizer (model.tokenizer)"
            )
        self._check_stable()

    def tokens_of_results(self, results: Sequence[Result], *, ended: bool) -> list[int]:
        if self.role == "tool":
            return self.tokens([{"role": "tool", "name": name, "content": text} for name, text in results], ended=ended)
        content = "\n".join(WRAPPED[self.form].format(text) for _, text in results)
        return self.tokens([{"role": "user", "content": content}], ended=ended)

    def tokens(self, messages: list[dict[str, str]], *, ended: bool) -> list[int]:
        """The tokens from the end of an assistant's turn to the beginning of the next one. ``ended``: the turn's last
        token has ended it, so the token that the template ends turns with is left out."""
        before, behind = self._parted(self._conversation(messages))
        mark = self._mark_of_end(behind)
        encode = self.tokenizer.encode
        head = encode(before + mark, add_special_tokens=False)
        both = encode(before + behind, add_special_tokens=False)
        rest = behind[len(mark) :]
        found = both[len(head) :] if both[: len(head)] == head else encode(rest, add_special_tokens=False)
        return found if ended or not mark else [*encode(mark, add_special_tokens=False), *found]

    def _conversation(
        self, messages: list[dict[str, str]], said: str = DUMMIES[0], earlier: Sequence[dict[str, str]] = ()
    ) -> str:
        asked = {"role": "user", "content": "x"}
        told = [asked, *earlier, {"role": "assistant", "content": said}, *messages]
        return render(told, self.tokenizer, self.date, add_generation_prompt=True, **self.kwargs)

    def _parted(self, text: str, said: str = DUMMIES[0]) -> tuple[str, str]:
        """The text of a conversation up to the end of what the assistant said, and the rest."""
        end = text.rindex(said) + len(said)
        return text[:end], text[end:]

    def _mark_of_end(self, behind: str) -> str:
        """The special token with which the template ends the assistant's turn; empty where it has none."""
        found = _finder_of_special(self.tokenizer).match(behind)
        return found.group() if found else ""

    def _example(self) -> list[dict[str, str]]:
        return [{"role": self.role, "content": DUMMIES[1]} | ({"name": "tool"} if self.role == "tool" else {})]

    def _has_place(self, role: str) -> bool:
        """Does the template show a message of that role behind the assistant's, and begin an answer to it?"""
        message = {"role": role, "content": DUMMIES[1]} | ({"name": "tool"} if role == "tool" else {})
        try:
            text = self._conversation([message])
            return DUMMIES[0] in text and DUMMIES[1] in self._parted(text)[1]
        except TemplateHangs:
            raise
        except Exception:  # a template is a program and may raise anything
            return False

    def _check_stable(self) -> None:
        """What stands behind a turn must not depend on what was said before it, or an episode would look as no
        conversation does."""
        example = self._example()
        expected = self._parted(self._conversation(example))[1]
        earlier = [{"role": "assistant", "content": "y"}, *example]
        others = (
            self._parted(self._conversation(example, "z"), "z")[1],
            self._parted(self._conversation(example, earlier=earlier))[1],
        )
        if any(other != expected for other in others):
            raise UserError(
                f"{self.key}: what the tokenizer's chat template writes behind a turn of the assistant depends on the "
                "turns before it, so tokens cannot be added turn by turn; take a template that does not"
            )
        thought = f"<think>\n{DUMMIES[1]}\n</think>\n\n{DUMMIES[0]}"
        if DUMMIES[1] not in self._conversation([{"role": "user", "content": "x"}], thought):
            log.info(
                "%s: the chat template leaves out what earlier turns have thought. In an episode the model's tokens "
                "stay as they were drawn",
                self.key,
            )


def _knows_tools(tokenizer: Any) -> bool:
    return "tool" in str(tokenizer.chat_template)
