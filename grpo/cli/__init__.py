"""The `grpo` command: what each command asks for, and how it ends.

Nothing imports from here but ``python -m grpo``."""
