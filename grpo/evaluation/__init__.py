"""Evaluation: how good a model is, and how surely.

``held_out`` samples and scores held-out rows, ``suites`` those of published suites (``grpo/config/suites.yaml``).
Others take ``during`` for the suites of a run, ``outside`` for a model without a run (``grpo eval``), and
``statistics``, what outcomes say: intervals, pass@k, maj@k, a paired test of two models. It needs numpy alone.
"""
