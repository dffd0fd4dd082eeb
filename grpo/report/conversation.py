"""An episode of a rollout file as a conversation: what each side said, calls folded. Everything is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any

from grpo.report.markup import completion, cut, e, short

MOST_ARGUMENTS = 60  # characters of a call's arguments in the line that is always seen


def said(row: Mapping[str, Any], same: int = 0) -> str:
    """HTML of what a row's completion says: a conversation, or its text with the first ``same`` characters dimmed."""
    if turns := row.get("turns"):
        return conversation(turns)
    return f"<pre>{completion(str(row.get('completion', '')), same)}</pre>"


def conversation(turns: Sequence[Mapping[str, Any]]) -> str:
    """HTML of a row's ``turns``, as ``metrics.episode_row`` makes them."""
    numbers = count(1)
    parts = [_of_model(turn, next(numbers)) if _is_models(turn) else _of_environment(turn) for turn in turns]
    return f'<div class="turns">{"".join(parts)}</div>'


def in_a_line(turns: Sequence[Mapping[str, Any]]) -> str:
    """The same as plain text for a terminal: what the environment said, and what calls gave, in brackets."""
    return " ".join(part for turn in turns for part in _plain(turn) if part)


def notes_of(row: Mapping[str, Any]) -> list[str]:
    """What there is to say of an episode beside its text; nothing of a completion without turns."""
    if "turns" not in row:
        return []
    own = [turn for turn in row["turns"] if _is_models(turn)]
    calls = [call for turn in own for call in turn.get("calls", ())]
    failed = sum(bool(call.get("error")) for call in calls)
    notes = [_counted(len(own), "turn")]
    notes += [_counted(len(calls), "call") + (f", {failed} failed" if failed else "")] if calls else []
    notes += ["ended by the environment"] if row.get("status") == "environment" else []
    notes += ["out of turns"] if row.get("status") == "turns" else []
    notes += [f"failed: {row['failure']}"] if row.get("failure") else []
    return notes


def _of_model(turn: Mapping[str, Any], number: int) -> str:
    notes = [f"turn {number}", f"{turn.get('tokens', '?')} tokens"]
    notes += ["cut off"] if turn.get("ended") == "length" else []
    notes += [f"reward {turn['reward']:g}"] if turn.get("reward") is not None else []
    notes += [f"advantage {turn['advantage']:+.2f}"] if turn.get("advantage") is not None else []
    calls = "".join(map(_call, turn.get("calls", ())))
    text = completion(str(turn.get("text", "")))
    return f'<div class="turn"><p class="note">{e(" · ".join(notes))}</p><pre>{text}</pre>{calls}</div>'


def _of_environment(turn: Mapping[str, Any]) -> str:
    """Results of calls stand with the calls, so such a turn has no text."""
    note = f'<p class="note">the model read {turn.get("tokens", "?")} tokens of it</p>' if turn.get("cut") else ""
    said = f"<pre>{e(cut(turn['text']))}</pre>" if turn.get("text") else ""
    return f'<div class="turn said">{said}{note}</div>' if said or note else ""


def _call(call: Mapping[str, Any]) -> str:
    error, name = str(call.get("error") or ""), str(call.get("name") or "a call")
    outcome = f" failed: {error.replace('_', ' ')}" if error else f" → {short(_first_line(call.get('result')), 60)}"
    head = f"{name}({short(_arguments(call.get('arguments')), MOST_ARGUMENTS)}){outcome}"
    whole = f"<pre>{e(cut(str(call.get('arguments', ''))))}</pre><pre>{e(cut(str(call.get('result', ''))))}</pre>"
    kind = ' class="bad"' if error else ""
    return f"<details{kind}><summary>{e(head)}</summary>{whole}</details>"


def _arguments(text: Any) -> str:
    """``a=1, b=2`` of a JSON object; else the text's first line."""
    try:
        found = json.loads(str(text))
    except ValueError:
        found = None
    if isinstance(found, dict):
        return ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in found.items())
    return _first_line(text)


def _first_line(text: Any) -> str:
    return next(iter(str(text if text is not None else "").strip().splitlines()), "")


def _plain(turn: Mapping[str, Any]) -> Iterator[str]:
    text = str(turn.get("text", ""))
    if not _is_models(turn):
        yield f"[{text}]" if text else ""
        return
    yield text
    for call in turn.get("calls", ()):
        yield f"[{'!' if call.get('error') else ''}{call.get('result', '')}]"


def _is_models(turn: Mapping[str, Any]) -> bool:
    return turn.get("role") == "assistant"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
