"""``python -m grpo`` is the ``grpo`` command, so that ``accelerate launch -m grpo train ...`` works."""

from grpo.cli.main import main

if __name__ == "__main__":  # scoring workers are spawned: they import this module again under another name
    main()
