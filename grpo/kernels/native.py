"""C++ for CPUs, compiled at first use into the user's cache folder: one call in place of many of torch's.

The sources use the OpenMP threads that torch has loaded, and no header of Python. Only the allocator's uses headers of
torch. Callers of ``library`` go on without it if there is no compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

FLAGS = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC"]
FLAGS += ["-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fno-trapping-math"]
TORCH = Path(torch.__file__).parent
HEADER = Path(__file__).with_name("vectors.h")


class CannotCompile(Exception):
    """Why there is no compiled code. It ends up as one line of the log."""


@cache
def library(source: Path, with_torch: bool = False) -> ctypes.CDLL:
    """The compiled source, from the cache folder if it is there already. Raises CannotCompile.

    ``with_torch`` for a source that includes headers of torch's core, c10.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or platform.system() != "Linux":
        raise CannotCompile(f"there is no C++ compiler here ({', '.join(names)})")
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    texts = [HEADER.read_text(), source.read_text()]
    include, link = ([f"-I{TORCH}/include"], [f"-L{TORCH}/lib", "-lc10"]) if with_torch else ([], [])
    machine = [os.path.realpath(compiler), cpu, platform.machine(), torch.__version__]
    of = "\0".join([*texts, *FLAGS, *include, *link, *machine])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo"
    file = folder / f"{source.stem}-{hashlib.sha256(of.encode()).hexdigest()[:16]}.so"
    try:
        if not file.exists():
            _compile(compiler, source, file, include, link)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["without a word"]
        raise CannotCompile(f"{compiler} failed: {said[-1]}") from error
    except OSError as error:  # a folder that can't be written, or a torch without OpenMP's symbols
        raise CannotCompile(str(error)) from error


def _compile(compiler: str, source: Path, file: Path, include: list[str], link: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        built = Path(folder) / file.name
        # Linked apart and without -fopenmp: the symbols are those of the OpenMP that torch has loaded, whose threads
        # would otherwise spin beside another's.
        for command in (
            [compiler, *FLAGS, *include, "-c", str(source), "-o", f"{built}.o"],
            [compiler, "-shared", f"{built}.o", *link, "-o", str(built)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(built, file)  # other processes see all of it or nothing
