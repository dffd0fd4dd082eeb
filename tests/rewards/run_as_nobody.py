"""``run_as_nobody.py LEVEL FOLDER``: runs ``attacks.py LEVEL`` as the user nobody, started by root.

Root's own Python may lie where nobody cannot go (``/root``), so Python and this project are first mounted, in a mount
namespace of this process alone, over FOLDER, whose parents everybody may enter.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def main(level: str, stage: str) -> None:
    sys.path.insert(0, str(ROOT))
    from rewards.sandbox import kernel

    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.make_mounts_private()
    kernel.mount_tmpfs(stage)
    os.chmod(stage, 0o755)
    for name, source in (("python", sys.base_prefix), ("project", str(ROOT))):
        os.mkdir(f"{stage}/{name}")
        kernel.bind(source, f"{stage}/{name}")
    python = f"{stage}/python/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    os.chdir(f"{stage}/project")
    environment = {"PYTHONPATH": f"{stage}/project", "PYTHONHOME": f"{stage}/python", "PYTHONDONTWRITEBYTECODE": "1"}
    os.execve(python, [python, "tests/rewards/attacks.py", level], environment)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
