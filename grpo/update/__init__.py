"""One optimizer step from scored sequences, in micro-batches that memory holds.

Others take ``step.optimizer_step``, ``step.backward`` and ``forward``."""
