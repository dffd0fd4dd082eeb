"""Environments: what answers the model between its turns, in processes that may die.

Others take ``episodes`` (``open_episodes``, ``play``).
"""
