"""Checks of rows and rewards before a run: `grpo audit`, `grpo validate`.

Others take ``audit.audit`` and the checks of ``rows``."""
