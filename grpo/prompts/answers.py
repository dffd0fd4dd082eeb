"""How answers to the model stand in plain text between its turns. Episodes and supervised rows both take it from here,
so that a model is sampled as it was taught. With a chat template, the template says it."""

from __future__ import annotations

from typing import Any

STOPS = {"hermes": ("</tool_call>",), "llama": (), "python": ("\n```\n",)}
"""By the format of calls (``environment.tool_format``): the strings that end a turn of the model, besides EOS. In a
chat, hermes has none: the model may write several calls, and ends its turn itself."""
WRAPPED = {
    "hermes": "<tool_response>\n{}\n</tool_response>",
    "llama": "<tool_response>\n{}\n</tool_response>",
    "python": "```output\n{}\n```",
}
"""What stands around what a tool said, by the format of calls."""
PLAIN = "\n{}\n"
"""What stands around all of an answer."""


def encode_behind(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that stands behind others. Encoded alone, some tokenizers would put a space before it."""
    before = tokenizer.encode("x", add_special_tokens=False)
    both = tokenizer.encode(f"x{text}", add_special_tokens=False)
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)
