"""Evaluation: how good a model is, and how surely.

``held_out`` samples and scores held-out rows: for the trainer at a step, for ``grpo eval`` and the probe.
``statistics`` is what outcomes say: intervals, pass@k. It needs numpy alone.
"""
