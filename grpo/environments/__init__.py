"""Environments: what answers the model between its turns, in processes that may die.

Others take ``episodes`` (``open_episodes``, ``play``) and ``prepared`` (a recipe's task with its environment). The
audit, which plays without a model, takes ``find``, ``loading``, ``worlds`` and ``living``.
"""
