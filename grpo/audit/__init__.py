"""Checks of rows and rewards before a run: `grpo audit`, `grpo validate`.

Others take ``audit.audit``, ``at_start.audit_at_start`` and the checks of ``rows``."""
