"""The math reward: extraction, canonical text and forms, an exact comparison, and the worker that asks sympy.

Others take ``math_reward``, ``verify``, ``gold_fault`` and ``check_row`` (why a row cannot be judged), ``votes``
(which completions give the same answer), and ``start`` and ``stop`` of its workers. It is a library of its own: nothing
here imports the trainer, torch or transformers.
"""

from rewards.math.reward import check_row, gold_fault, math_reward, start, stop, verify
from rewards.math.votes import votes

JUDGES = "answer"

__all__ = ["check_row", "gold_fault", "math_reward", "start", "stop", "verify", "votes"]
