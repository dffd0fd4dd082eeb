"""Installed packages that programs may import: where they lie, so that a sandbox shows them and nothing beside."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


class PackageRefused(RuntimeError):
    """A package that programs are to have is not there, or cannot be imported; the message says which and why."""


@dataclass(frozen=True)
class Packages:
    """``names`` are imported, ``paths`` (files and folders) can be read, ``roots`` are where imports look for them."""

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()


def names_of(given: Sequence[str]) -> tuple[str, ...]:
    """The names of packages, in one order. Raises PackageRefused where they are no list of names."""
    if isinstance(given, str) or not all(isinstance(name, str) for name in given):
        raise PackageRefused(f"packages: expected a list of names, such as [numpy, sortedcontainers], got {given!r}")
    return tuple(sorted(set(given)))


def find_packages(names: Sequence[str]) -> Packages:
    """Where packages lie, each with the libraries and the description that were installed beside it.

    What a package imports itself is not looked for: name that too. Names of the standard library are there anyway.

    Raises:
        PackageRefused: there is no such package here.
    """
    chosen = names_of(names)
    paths: list[str] = []
    roots: list[str] = []
    for name in chosen:
        if name in sys.stdlib_module_names:
            continue
        for place in _places(name):
            root = os.path.dirname(place)
            beside = [f"{root}/{name}.libs", *glob.glob(f"{glob.escape(root)}/{glob.escape(name)}-*.dist-info")]
            paths += [place, *filter(os.path.isdir, beside)]
            roots.append(root)
    return Packages(chosen, tuple(dict.fromkeys(paths)), tuple(dict.fromkeys(roots)))


def _places(name: str) -> list[str]:
    """The folder or the file of a top-level package. Looks for it without importing it."""
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise PackageRefused(f"packages: there is no package {name!r} in this environment ({sys.prefix})")
    folders = list(spec.submodule_search_locations or [])
    return [os.path.realpath(place) for place in folders or [str(spec.origin)]]
