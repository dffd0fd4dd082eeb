"""GRPO training for small models that learn to reason. The CLI is ``grpo``; the loop is ``grpo/trainer.py``."""

import logging

__version__ = "0.1.0"

# peft imports bitsandbytes, which on a CPU warns that it has not found a kernel for inference: it is never used here
# (model/quantized.py says why). Set here, since a task or a reward of the user's own may import them first.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
