"""The `grpo` command: ``main.py`` lists the commands, the files beside it hold them, ``exit_codes.py`` ends them.

Nothing imports from here but ``python -m grpo`` and the ``grpo`` script, which take ``main.main``."""
