"""Rules that notice a run that is failing, from its metrics alone, each with a likely cause and a cure.

Others take ``rules`` (the rules), ``watch`` (which of them hold, step by step), ``history`` (the metrics so far, as
they see them), ``bands`` (what a recipe expects) and ``best`` (the best evaluation so far).
"""
