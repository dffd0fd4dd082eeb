"""Rows become prompts, and in what order; the one room that imports ``data``.

Others take ``task`` (``load_task``, ``Task``), ``order`` (a step's prompts) and ``checks`` (before weights load)."""
