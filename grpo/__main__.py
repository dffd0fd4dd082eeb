"""``python -m grpo`` is the ``grpo`` command, so that ``accelerate launch -m grpo train ...`` works.

A run is asked to stop by a signal, maybe in its first second: so ``train`` listens before anything else is imported.
"""

import sys
from contextlib import nullcontext

from grpo.errors import Preempted
from grpo.run import stopping


def main() -> None:
    """Entry point of the ``grpo`` script and of ``python -m grpo``."""
    try:
        with stopping.listening() if sys.argv[1:2] == ["train"] else nullcontext():
            from grpo.cli.main import main as command

            command()
    except Preempted as request:  # during imports; a command says it itself
        print(request, file=sys.stderr)
        sys.exit(request.code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":  # scoring workers are spawned: they import this module again under another name
    main()
