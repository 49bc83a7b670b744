"""The user's modules apart from the process's own: which files are the user's, and what a name would import."""

import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from deploy.artifact.manifest import file_digest

INSTALLED = ("site-packages", "dist-packages")
_STDLIB = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_OURS = str(Path(__file__).resolve().parent) + os.sep


@dataclass(frozen=True, kw_only=True)
class Program:
    """The user's modules by name, SHA-256 of their files by path, and what they themselves added to sys.path."""

    modules: Mapping[str, ModuleType] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    def is_unchanged(self) -> bool:
        return all(os.path.isfile(file) and file_digest(Path(file)) == digest for file, digest in self.digests.items())


def existing(folder: str | None) -> list[str]:
    return [folder] if folder else []


def package_of(file: Path) -> tuple[str | None, Path]:
    """Dotted name of a file in a package and the folder that holds the package; None and its own folder otherwise."""
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return (".".join(parts) if folder != file.parent else None), folder


def means(name: str, file: Path, path: list[str]) -> bool:
    """Whether `import name` would run `file`; found without running anything."""
    top, *rest = name.split(".")
    spec = PathFinder.find_spec(top, path)
    if spec is None:
        return False
    if not rest:
        return spec.origin is not None and Path(spec.origin).resolve() == file.resolve()
    folder = next(iter(spec.submodule_search_locations or ()), None)
    if folder is None:
        return False
    expected = Path(folder, *rest)
    return file.resolve() in (expected.with_name(expected.name + ".py").resolve(), (expected / "__init__.py").resolve())


def folder_module(name: str, folder: str) -> ModuleType:
    """A namespace package of one folder."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder]
    module = importlib.util.module_from_spec(spec)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def is_protected(top: str) -> bool:
    """Whether a top-level name belongs to the standard library, to us or to what is installed and loaded."""
    if top in sys.stdlib_module_names or top in ("deploy", "__main__"):
        return True
    module = sys.modules.get(top)
    return module is not None and is_installed(_place(module))


def is_hidden(name: str, folders: tuple[str, ...]) -> bool:
    """Whether the process's own module `name` would stand in the way of one of the user's."""
    top = name.partition(".")[0]
    if is_protected(top):
        return False
    return any(
        os.path.isfile(os.path.join(folder, top + ".py")) or os.path.isdir(os.path.join(folder, top)) for folder in folders
    )


def _place(module: ModuleType) -> str:
    """The file of a module, or the first folder of a namespace package."""
    file = getattr(module, "__file__", None)
    if file:
        return str(file)
    return str(next(iter(getattr(module, "__path__", ())), "")) + os.sep


def is_installed(place: str) -> bool:
    real = os.path.realpath(place) + (os.sep if place.endswith(os.sep) else "")
    return any(f"{os.sep}{part}{os.sep}" in real for part in INSTALLED) or real.startswith(_STDLIB)


def is_user(module: ModuleType) -> bool:
    place = _place(module)
    if place == os.sep:
        return False  # built in
    return not is_installed(place) and not os.path.realpath(place).startswith(_OURS)


def file_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if file and os.path.isfile(file) else None


def where(error: BaseException) -> str:
    """` (FILE:LINE)`, the innermost line of the user's own code in the traceback of `error`; nothing where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if os.path.isfile(f.filename) and not is_installed(f.filename) and not f.filename.startswith(_OURS)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
