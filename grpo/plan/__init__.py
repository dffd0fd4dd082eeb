"""What a run will take, said before it begins: memory, disk, hours, dollars (``grpo plan``); and whether it will learn
(``grpo probe``).

Others take ``plan``, ``cards``, ``work`` (what a step computes) ``text`` (a plan in words),
``here`` (a plan for this machine), ``probe`` and ``probe_text``.
"""
