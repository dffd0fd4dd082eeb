"""Pieces of HTML that pages share. Everything that comes from a run is escaped here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo.errors import printable

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
LONGEST = 20_000  # characters of a completion
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_OPENS, _CLOSES = "&lt;answer&gt;", "&lt;/answer&gt;"


def document(title: str, body: str, head: str = "") -> str:
    """A page that needs no network and runs no script."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
{head}<title>{e(title)}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def e(value: Any) -> str:
    """Text that is safe inside HTML, control characters and marks that turn text round made visible."""
    return html.escape(printable(str(value).translate(_CONTROL)))


def in_words(text: str) -> str:
    """Escaped, with what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", e(text))


def short(value: Any, most: int = 80) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def large(value: float) -> str:
    """``1.2M``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def table(rows: Iterable[tuple[str, Any]]) -> str:
    return "<table>" + "".join(f"<tr><th>{e(name)}</th><td>{e(value)}</td></tr>" for name, value in rows) + "</table>"


def cut(text: str) -> str:
    """The text without its middle, where it is very long."""
    left_out = len(text) - LONGEST
    if left_out <= 0:
        return text
    return f"{text[: LONGEST // 2]}\n[… {left_out:,} characters …]\n{text[-LONGEST // 2 :]}"


def completion(text: str, same: int = 0) -> str:
    """Escaped, with the answer marked, tags dimmed, and so the first ``same`` characters of it."""
    text = cut(text)
    rest = _with_tags(text[same:])
    return f'<span class="same">{_with_tags(text[:same])}</span>{rest}' if same else rest


def _with_tags(text: str) -> str:
    return re.sub(r"&lt;/?(?:think|answer)&gt;", r"<i>\g<0></i>", marked(e(text)))


def marked(escaped: str) -> str:
    """The text with its answers marked, each from a tag that opens to the next that closes. In one pass: a model may
    open thousands and close none."""
    parts, at = [], 0
    while (start := escaped.find(_OPENS, at)) >= 0 and (end := escaped.find(_CLOSES, start)) >= 0:
        end += len(_CLOSES)
        parts += [escaped[at:start], "<mark>", escaped[start:end], "</mark>"]
        at = end
    return "".join([*parts, escaped[at:]])


def common_prefix(texts: list[str]) -> int:
    """How many characters the texts begin with in common, cut back to the end of a word, and to before an answer that
    is still open there."""
    first, last = min(texts), max(texts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    if same == max(len(first), len(last)):
        return same
    begun = first[:same]
    if not begun.endswith((" ", "\n")):
        same = max(begun.rfind(" "), begun.rfind("\n")) + 1
    opened, closed = first.rfind("<answer>", 0, same), first.rfind("</answer>", 0, same)
    return opened if opened > closed else same
