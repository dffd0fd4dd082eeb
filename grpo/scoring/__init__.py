"""Reward functions over groups of completions, in processes that may hang, crash or eat memory; without torch.

Others take ``scorer.Scorer``, ``grade.grader`` for completions without a run, and ``functions`` to ask rewards about
rows. No other room imports ``rewards``."""
