"""The math reward: extraction, canonical text and forms, an exact comparison, and the worker that asks sympy.

Others take ``math_reward``, ``verify``, the checks of rows and golds, and ``start`` and ``stop`` of its workers.
"""

from rewards.math.reward import check_gold, check_row, math_reward, start, stop, verify

JUDGES = "answer"

__all__ = ["check_gold", "check_row", "math_reward", "start", "stop", "verify"]
