"""What is done with a model between two runs: completions sampled from it, judged, and kept as rows.

Others take ``generate`` (n completions a prompt, scored, in a file with which a killed process goes on) and ``sampled``
(that file).
"""
