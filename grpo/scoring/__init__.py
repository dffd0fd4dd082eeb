"""Reward functions over groups of completions, in processes that may hang, crash or eat memory; without torch.

Others take ``scorer.Scorer``; ``functions`` is the one module that imports ``rewards``."""
