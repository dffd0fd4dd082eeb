"""The policy: the model that learns, its log-probabilities, where its weights come from, and its optimizer.

Others take ``policy.Policy``, ``loading``, ``optimizer``, ``logprob_lm``, ``truncation``, ``processes``,
``placing``, ``moments``, ``files``, ``first_process``, ``devices``, ``device_memory``, ``borders``, ``lora``,
``memory_budget``, ``teacher``, ``same_tokenizer`` and ``shape``.
"""
