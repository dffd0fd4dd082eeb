"""Rules that notice a run that is failing, from its metrics alone, each with a likely cause and a cure.

Others take ``rules`` (the rules) and ``watch`` (which of them hold, step by step).
"""
