"""Tasks, one file each: ``data/<name>.py`` has ``build(split, size, seed, ...)`` and is ``data: {name: <name>}``.

Nothing here imports ``grpo`` or torch. The other files hold what tasks share, and the tiny model.
"""

TASKS = (
    "calculator_traces",
    "code",
    "countdown",
    "gsm8k",
    "math",
    "number_guess",
    "number_guess_traces",
    "one_liner_traces",
    "one_liners",
    "reasoning_gym",
    "reverse_text",
    "traces",
    "word_sum_traces",
    "word_sums",
    "wordle",
    "worked_examples",
)
"""Every task by name. A test holds this equal to the files that define ``build``."""
