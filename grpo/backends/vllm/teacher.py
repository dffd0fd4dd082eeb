"""A teacher on vLLM servers: what it says of texts that it did not write, token by token.

A text goes out as token ids and comes back as a prompt's log-probabilities. Those are at temperature 1 whatever is
asked: vLLM applies no sampling to a prompt (0.32 and 0.33, ``GPUModelRunner._get_prompt_logprobs_dict``).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from grpo.backends.vllm.api import Server, ServerGone
from grpo.backends.vllm.completions import UNKNOWN
from grpo.backends.vllm.pool import open_session
from grpo.config import TeacherConfig
from grpo.errors import BackendFailed, UserError
from grpo.model.same_tokenizer import CURE
from grpo.types import TeacherSays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its completion

AT_ONCE = 64  # requests open on one server
ATTEMPTS = 5  # of one text: a request that servers die of would come again and again
PAUSE = 1.0  # seconds between two looks at a server that is lost


class TeacherServers:
    """The servers of ``teacher.url``, which hold the same model. Texts go to whichever is free."""

    def __init__(self, config: TeacherConfig):
        self.config = config
        self.models: dict[str, str] = {}  # by URL, the name that a server gives its model

    def check(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        """Raise UserError unless every server answers, holds the same model, reads texts of ``longest`` tokens and
        means the same by a token id."""
        asyncio.run(self._check(tokenizer, longest))

    def ask(self, texts: Sequence[Text]) -> list[TeacherSays]:
        """What the teacher says of each text's completion.

        Raises:
            BackendFailed: no server is left, or what one says are no log-probabilities.
        """
        return asyncio.run(self._ask(texts)) if texts else []

    # --- what a run begins with

    async def _check(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        held: dict[str, str] = {}
        async with AsyncExitStack() as stack:
            for server in await self._open(stack):
                try:
                    model = (await server.models())[0]
                    self.models[server.url] = model["id"]
                    held[server.url] = str(model.get("root") or model["id"])
                    if (limit := model.get("max_model_len")) and limit < longest + 1:
                        raise UserError(
                            f"teacher.url: {server.url} reads {limit} tokens at most, and prompt and completion may "
                            f"have {longest} together and one more: start it with --max-model-len={longest + 1}"
                        )
                    await self._check_tokenizer(server, tokenizer)
                    some = len(tokenizer) // 2
                    await self._one(server, [some], [some])  # it may allow fewer than top_k log-probabilities
                except ServerGone as why:
                    raise UserError(f"teacher.url: {server.url} cannot be reached: {why}") from None
                except BackendFailed as why:
                    raise UserError(f"teacher.url: {why}") from None
        if len(set(held.values())) > 1:
            named = ", ".join(f"{url}: {model}" for url, model in held.items())
            raise UserError(f"teacher.url: the servers hold different models ({named})")

    async def _check_tokenizer(self, server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
        """Every id must be the same text on both sides; where one is not, the first is found by halving."""
        model, first, last = self.models[server.url], 0, len(tokenizer)
        if await self._same(server, model, tokenizer, first, last):
            return
        while last - first > 1:
            middle = (first + last) // 2
            if await self._same(server, model, tokenizer, first, middle):
                first = middle
            else:
                last = middle
        theirs = await server.detokenize(model, [first], timeout=self.config.timeout)
        raise UserError(
            f"teacher.url: the tokenizer of {server.url} is not the student's, so it can't judge the student's tokens: "
            f"token {first} is {_text(tokenizer, [first])!r} of the student and {theirs!r} of the teacher. "
            f"{CURE}"
        )

    async def _same(self, server: Server, model: str, tokenizer: Any, first: int, last: int) -> bool:
        ids = list(range(first, last))
        try:
            theirs = await server.detokenize(model, ids, timeout=self.config.timeout)
        except BackendFailed:  # an id that its tokenizer does not have
            return False
        return theirs == _text(tokenizer, ids)

    # --- a step's texts

    async def _ask(self, texts: Sequence[Text]) -> list[TeacherSays]:
        found: list[TeacherSays | None] = [None] * len(texts)
        waiting, tries = deque(range(len(texts))), Counter[int]()
        async with AsyncExitStack() as stack:
            servers = await self._open(stack)
            lost: dict[str, str] = {}
            while waiting:
                live = [server for server in servers if server.url not in lost]
                if not live:
                    live = await self._wait_for_any(servers, lost)
                each = min(AT_ONCE, len(waiting))
                workers = [self._work(s, texts, waiting, tries, found, lost) for s in live for _ in range(each)]
                await asyncio.gather(*workers)
        return [says for says in found if says is not None]

    async def _work(
        self,
        server: Server,
        texts: Sequence[Text],
        waiting: deque[int],
        tries: Counter[int],
        found: list[TeacherSays | None],
        lost: dict[str, str],
    ) -> None:
        """Take texts while there are any and the server answers. A text that it leaves goes back to those that wait."""
        while waiting and server.url not in lost:
            place = waiting.popleft()
            try:
                found[place] = await self._one(server, *texts[place])
            except ServerGone as why:
                lost[server.url] = str(why)
                tries[place] += 1
                if tries[place] == ATTEMPTS:
                    raise BackendFailed(
                        f"teacher.url: a text of {sum(map(len, texts[place]))} tokens was not judged in {ATTEMPTS} "
                        f"attempts; the last error of {server.url}: {why}"
                    ) from None
                waiting.append(place)

    async def _wait_for_any(self, servers: list[Server], lost: dict[str, str]) -> list[Server]:
        """The servers that are back, once one is."""
        deadline = time.monotonic() + self.config.timeout
        while True:
            back = [server for server in servers if await _answers(server)]
            if back:
                for server in back:
                    lost.pop(server.url)
                return back
            if time.monotonic() > deadline:
                said = "; ".join(f"{url}: {why}" for url, why in lost.items())
                raise BackendFailed(f"teacher.url: no server came back in {self.config.timeout:g} s ({said})")
            await asyncio.sleep(PAUSE)

    async def _one(self, server: Server, prompt: Sequence[int], completion: Sequence[int]) -> TeacherSays:
        if not len(completion):
            return TeacherSays((), [], []) if self.config.top_k else TeacherSays()
        ids, top_k = [*map(int, prompt), *map(int, completion)], self.config.top_k
        if server.url not in self.models:  # the first process has looked, the others have not
            self.models[server.url] = (await server.models())[0]["id"]
        model = self.models[server.url]
        entries = await server.prompt_logprobs(model, ids, top_k=top_k, timeout=self.config.timeout)
        entries = entries[len(prompt) :]
        if top_k == 0:
            pairs = zip(completion, entries, strict=True)
            return TeacherSays([_finite(server, entry[str(token)]["logprob"]) for token, entry in pairs])
        # The text's own token is there too, with its rank; the estimate must not depend on it.
        ranked = [sorted((e["rank"], int(i), e["logprob"]) for i, e in entry.items()) for entry in entries]
        likeliest = [of_token[:top_k] for of_token in ranked]
        return TeacherSays(
            (),
            [[token for _, token, _ in of_token] for of_token in likeliest],
            [[_finite(server, logprob) for _, _, logprob in of_token] for of_token in likeliest],
        )

    async def _open(self, stack: AsyncExitStack) -> list[Server]:
        return [Server(url, await stack.enter_async_context(await open_session(url))) for url in self.config.urls()]


async def _answers(server: Server) -> bool:
    try:
        await server.check_health()
    except (ServerGone, BackendFailed):
        return False
    return True


def _finite(server: Server, logprob: float | None) -> float:
    if logprob is None or not math.isfinite(logprob) or logprob <= UNKNOWN:
        raise BackendFailed(
            f"teacher.url: {server.url} says a log-probability of {logprob}: it computes wrongly (an overflow of its "
            "type, or broken weights), or forbids tokens that the student may say"
        )
    return float(logprob)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
