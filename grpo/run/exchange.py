"""What each process has sampled, on every process: groups are sent as a few flat arrays and one small rest.

As lists, a token would take every process over 100 ns to read and 68 bytes to hold, which ``benchmarks/exchange.py``
measures. Completions that were packed come back with arrays of numbers. A checkpoint holds the same packed form.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from grpo.types import Completion, Episode, Group, Prompt, Status, ToolCall, Turn, VersionSpan

Packed = dict[str, Any]
"""C completions. Tensors: ``token_ids`` (int32) and ``logprobs`` (float32 where that is exact, else float64) of all of
them, one behind the other; ``lengths`` (C,); ``versions``, a row (completion, start, end, version) for each span. Lists
of text: ``statuses`` and ``texts``. Where an environment answered, ``episodes`` as plain values."""


def gather_groups(mine: Mapping[int, Group]) -> list[Group]:
    """The groups of all processes in the order of their places, which are the keys. Every process calls it."""
    places = sorted(mine)
    if PartialState().num_processes == 1:
        return [mine[place] for place in places]
    packed = pack([completion for place in places for completion in mine[place].completions])
    rest = [(place, len(mine[place].completions), replace(mine[place], completions=[])) for place in places]
    found: dict[int, Group] = {}
    for packed_there, rest_there in gather_object([(packed, rest)]):
        completions = iter(unpack(packed_there))
        for place, size, group in rest_there:
            found[place] = replace(group, completions=list(islice(completions, size)))
    return [found[place] for place in sorted(found)]


def pack(completions: Sequence[Completion]) -> Packed:
    """The completions as flat tensors and text. No number changes."""
    logprobs = _flat((c.sampler_logprobs for c in completions), np.float64)
    rounded = logprobs.astype(np.float32)
    if np.array_equal(rounded, logprobs, equal_nan=True):
        logprobs = rounded
    spans = [(i, s.start, s.end, s.version) for i, c in enumerate(completions) for s in c.versions]
    episodes = [None if c.episode is None else asdict(c.episode) for c in completions]
    return ({"episodes": episodes} if any(episodes) else {}) | {
        "token_ids": torch.from_numpy(_flat((c.token_ids for c in completions), np.int32)),
        "logprobs": torch.from_numpy(logprobs),
        "lengths": torch.tensor([len(c.token_ids) for c in completions], dtype=torch.int32),
        "versions": torch.tensor(spans, dtype=torch.int32).reshape(-1, 4),
        "statuses": [c.status.value for c in completions],
        "texts": [c.text for c in completions],
    }


def unpack(packed: Packed | list[dict[str, Any]]) -> list[Completion]:
    """Inverse of ``pack``; token ids and log-probabilities are arrays. Also reads what older checkpoints hold."""
    if isinstance(packed, list):
        return [_from_values(values) for values in packed]
    bounds = [0, *accumulate(packed["lengths"].tolist())]
    token_ids, logprobs = array("i"), array("f" if packed["logprobs"].dtype == torch.float32 else "d")
    token_ids.frombytes(packed["token_ids"].numpy().tobytes())
    logprobs.frombytes(packed["logprobs"].numpy().tobytes())
    versions: list[list[VersionSpan]] = [[] for _ in packed["texts"]]
    for place, start, end, version in packed["versions"].tolist():
        versions[place].append(VersionSpan(start, end, version))
    episodes = packed.get("episodes") or [None] * len(versions)
    return [
        Completion(token_ids[start:end], logprobs[start:end], Status(status), text, spans, _episode(values))
        for (start, end), status, text, spans, values in zip(
            pairwise(bounds), packed["statuses"], packed["texts"], versions, episodes, strict=True
        )
    ]


def pack_prompt(group: Group) -> dict[str, Any] | None:
    """The group's prompt as it was used, where an environment may have made it other than the row's; else None."""
    if all(completion.episode is None for completion in group.completions):
        return None
    prompt = group.prompt
    return {
        "prompt": prompt.prompt,
        "text": prompt.text,
        "token_ids": list(prompt.token_ids),
        "prefill": prompt.prefill,
    }


def unpack_prompt(prompt: Prompt, packed: dict[str, Any] | None) -> Prompt:
    """The row's ``prompt`` as it was used."""
    return prompt if packed is None else replace(prompt, **packed)


def _episode(values: dict[str, Any] | None) -> Episode | None:
    if values is None:
        return None
    turns = [Turn(**{**turn, "calls": tuple(ToolCall(**call) for call in turn["calls"])}) for turn in values["turns"]]
    return Episode(**{**values, "turns": turns})


def _flat(rows: Iterable[Sequence[float]], dtype: type[np.generic]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _from_values(values: dict[str, Any]) -> Completion:
    """A completion of a checkpoint from before they were packed: its fields as plain values."""
    versions = [VersionSpan(**span) for span in values["versions"]]
    return Completion(**{**values, "status": Status(values["status"]), "versions": versions})
