"""What an import in the user's own code means. Standard library only.

Our packages ``data``, ``rewards`` and ``recipes`` have common names, which a user's project folder may use too. Both
must work. Our code gets ours, whatever lies in the working directory (``import_ours``). The user's code gets the user's
own module of that name if there is one, else ours.

Python looks modules up in ``sys.modules`` by name alone. So a user's module whose name is taken is stored there under a
new name, and each of the user's modules runs with an ``__import__`` that knows the new names (Python looks
``__import__`` up in a module's ``__builtins__``). ``_Finder`` gives it to files that a recipe names, to their
neighbours, and to the modules of packages among those.
"""

from __future__ import annotations

import builtins
import importlib
import re
import sys
import zlib
from collections.abc import Iterable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # holds grpo/ and OURS, in a checkout and in site-packages
OURS = ("data", "rewards", "recipes")
MARK = "__user_folder__"  # in the builtins of the user's modules: the folder that their imports look in first


def import_ours() -> None:
    """Import our packages (OURS) from beside ``grpo``, so that none in the working directory is taken instead.

    Call at the start of a process, before anything imports them. Raises UserError where one is not there.
    """
    sys.path.insert(0, str(ROOT))
    try:
        for name in OURS:
            module = importlib.import_module(name)
            if Path(module.__file__ or "").resolve() != ROOT / name / "__init__.py":
                raise UserError(f"grpo's own package `{name}` is not in {ROOT}: install grpo again")
    except ModuleNotFoundError as why:
        raise UserError(f"grpo's own package `{why.name}` is not in {ROOT}: install grpo again") from None
    finally:
        sys.path.remove(str(ROOT))


def import_user_module(where: str, folder: Path, file: Path | None = None) -> ModuleType:
    """Import the user's module: ``file``, or the dotted name ``where``. It can import its neighbours in ``folder`` and
    what lies in the working directory. A file is executed once per process."""
    for place in (folder, Path.cwd().resolve()):
        finder.watch(place)
    if file is not None:
        return importlib.import_module(finder.name_for(file))
    top, dot, rest = where.partition(".")
    return importlib.import_module((finder.own(top, [rest.partition(".")[0]], folder) or top) + dot + rest)


def in_plain_names(text: str) -> str:
    """Python's message, with the user's modules under the names that the user gave them."""
    return re.sub(r"\b_user_(\w+)_[0-9a-f]{8}\b", r"\1", text)


class _Finder:
    """Finds what ``PathFinder`` finds; modules of the user's folders are then executed with an import of their own."""

    def __init__(self) -> None:
        self.folders: list[Path] = []  # where the user's modules and packages lie
        self.places: dict[str, Path] = {}  # file or package of each renamed module, by its new name
        self.folder_of: dict[str, Path] = {}  # the folder of each user's module, or of the package around it

    def watch(self, folder: Path) -> None:
        """From now on, modules imported from ``folder`` are the user's."""
        if self not in sys.meta_path:
            at = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
            sys.meta_path.insert(at, self)
        if folder not in self.folders:
            self.folders.append(folder)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # last: what lies there shadows nothing

    def name_for(self, place: Path) -> str:
        """A name in ``sys.modules`` that only this file or package has; a package's file is named as a part of it."""
        own = re.sub(r"[^0-9a-zA-Z]", "_", place.stem)
        if (place.parent / "__init__.py").is_file():
            name = f"{self.name_for(place.parent)}.{own}"
        else:
            name = f"_user_{own}_{zlib.crc32(str(place).encode()):08x}"
        self.places[name] = place
        return name

    def own(self, top: str, wanted: Iterable[str], folder: Path) -> str | None:
        """The new name of the user's module that code in ``folder`` means by ``top``; None if it needs none.

        It needs one where ``sys.modules`` has, or would get, another module as ``top``. ``wanted`` are the names that
        are imported from ``top``, in case it is a package.
        """
        if top in OURS:
            if any(folder.is_relative_to(ROOT / name) for name in OURS):
                return None
            found = _beside(top, wanted, folder) or _beside(top, wanted, Path.cwd().resolve())
            return self.name_for(found) if found else None
        lies_in = self.folder_of.get(top) if top in sys.modules else _folder_with(PathFinder.find_spec(top))
        if lies_in not in self.folders or (top in sys.modules and lies_in == folder):
            return None  # a library's, nobody's, or already what is meant
        found = _beside(top, wanted, folder)
        if found and (lies_in != folder or found in self.places.values()):
            return self.name_for(found)
        return None

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if name in self.places:
            place = self.places[name]
            spec, folder = _spec_at(name, place), place.parent
        elif parent in self.folder_of:
            spec, folder = PathFinder.find_spec(name, path, target), self.folder_of[parent]
        elif parent or name in (*OURS, "grpo"):
            return None
        else:
            spec = PathFinder.find_spec(name, None, target)
            if (lies_in := _folder_with(spec)) not in self.folders:
                return spec
            folder = lies_in
        if spec is not None:
            self.folder_of[name] = folder
            if type(spec.loader) is SourceFileLoader:
                spec.loader = _Loader(name, spec.loader.path, folder)
        return spec


class _Loader(SourceFileLoader):
    """Executes a user's module with the builtins of its folder, which its functions keep."""

    def __init__(self, name: str, path: str, folder: Path) -> None:
        super().__init__(name, path)
        self.folder = folder

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = _builtins_for(self.folder)
        super().exec_module(module)


@cache
def _builtins_for(folder: Path) -> dict[str, Any]:
    """Python's builtins, with an ``__import__`` that knows the user's own modules in ``folder``."""

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> ModuleType:
        top, dot, rest = name.partition(".")
        wanted = [rest.partition(".")[0]] if rest else fromlist or ()
        own = finder.own(top, wanted, folder) if level == 0 else None
        if own is None:
            return builtins.__import__(name, globals, locals, fromlist, level)
        module = importlib.import_module(own + dot + rest)
        if not fromlist:
            return sys.modules[own]  # `import data.rows` binds `data`
        return builtins.__import__(module.__name__, globals, locals, fromlist)

    return vars(builtins) | {"__import__": import_, MARK: folder}


def _beside(top: str, wanted: Iterable[str], folder: Path) -> Path | None:
    """The file or package ``top`` in ``folder``, unless it is ours.

    A folder without ``__init__.py`` may hold something other than code (rows, say). It counts as a package if it has
    one of the ``wanted`` modules, or, where none is named, any module.
    """
    spec = PathFinder.find_spec(top, [str(folder)])
    if spec is None or folder == ROOT:
        return None
    if spec.origin is not None:
        file = Path(spec.origin)
        return file.parent if spec.submodule_search_locations is not None else file
    place = folder / top
    names = [name for name in wanted if name != "*"]
    if names:
        return place if any((place / f"{n}.py").is_file() or (place / n).is_dir() for n in names) else None
    return place if any(place.glob("*.py")) else None


def _spec_at(name: str, place: Path) -> ModuleSpec | None:
    if not place.is_dir():
        return spec_from_file_location(name, place)
    if (place / "__init__.py").is_file():
        return spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    return spec


def _folder_with(spec: ModuleSpec | None) -> Path | None:
    """The folder in which a top-level module or package lies."""
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        locations = list(spec.submodule_search_locations)
        return Path(locations[0]).resolve().parent if locations else None
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


finder = _Finder()
