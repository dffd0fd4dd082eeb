"""The policy: the model that learns, as the update computes it, where its weights come from, its optimizer.

Others take ``policy.Policy``, ``loading``, ``optimizer``, ``logprob_lm``, ``truncation``, ``devices`` and
``device_memory``.
"""
