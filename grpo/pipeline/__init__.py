"""What is done with models between and around runs: completions sampled, judged and kept as rows; runs as a chain.

Others take ``generate`` (n completions a prompt, scored, in a file with which a killed process goes on) and ``sampled``
(that file); the command also ``keep`` and ``sample`` (which of them become rows), ``filter`` and ``decontaminate``
(which rows are worth training on), and ``chain_file``, ``chain``,
``summary`` and ``measure`` (stages, each a recipe, whose inputs are other stages' models and rows).
"""
