"""What a run will take, said before it begins: memory, disk, hours, dollars (``grpo plan``).

Others take ``plan``, ``cards``, ``work`` (what a step computes) and ``text`` (a plan in words).
"""
