"""The policy: the model that learns, its log-probabilities, where its weights come from, and its optimizer.

Others take ``policy.Policy``, ``loading``, ``optimizer``, ``logprob_lm``, ``truncation``, ``processes``,
``placing``, ``moments``, ``files``, ``first_process``, ``devices``, ``device_memory``, ``borders``,
``memory_budget`` and ``shape``.
"""

import logging

# peft imports bitsandbytes, which on a CPU warns that it has not found a kernel for inference: it is never used here
# (quantized.py says why).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
