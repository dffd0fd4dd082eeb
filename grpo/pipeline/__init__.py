"""What is done with models between and around runs.

Others take ``teach`` (what a teacher says of rows, token by token).
"""
