"""The error of a text that is no answer. In a module of its own, since everything that reads text raises it."""

from __future__ import annotations


class Unreadable(ValueError):
    """The text is no answer in the notation that is allowed; the message says why."""
