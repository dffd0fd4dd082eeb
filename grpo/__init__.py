"""GRPO training for small models that learn to reason. The CLI is ``grpo``; the loop is ``grpo/trainer.py``."""

import os

__version__ = "0.1.0"

# How long a CPU thread spins before it sleeps while it waits for others (GCC's OpenMP, which torch loads: so before
# torch). With the default, each of some hundred waits a forward pass may take a time slice where another process wants
# the cores: a decoding step of a tenth of a second took ten. On idle cores it makes no difference (docs/performance.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
