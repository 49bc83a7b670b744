"""A user's own factory, `FILE.py:FACTORY` or `pkg.mod:FACTORY`: finding it, importing it, and what it was made of.

The user's modules are imported apart from the rest of the process: a project may have a `models` or a `utils` of its own
while the program that embeds us has others. They are imported afresh, unless no file has changed since we did it last,
so that the digests in the manifest are those of the code that ran; modules of the same names are put back afterwards.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from deploy.artifact.manifest import SourceFile, file_digest
from deploy.errors import FactoryError, UsageError
from deploy.intake.recipe import Interface, Recipe
from deploy.models.errors import near

_INSTALLED = ("site-packages", "dist-packages")
_STDLIB = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_OURS = str(Path(__file__).resolve().parent) + os.sep

_APART = "_deploy_user_"
"""Before the name of a file whose own name means something else already."""


@dataclass(frozen=True, kw_only=True)
class _Program:
    """The user's modules by name, SHA-256 of their files by path, and what they themselves added to sys.path."""

    modules: Mapping[str, ModuleType] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    def is_unchanged(self) -> bool:
        return all(os.path.isfile(file) and file_digest(Path(file)) == digest for file, digest in self.digests.items())


_lock = threading.RLock()
_imported: dict[str, ModuleType] = {}
"""The user's modules that stand in sys.modules because we imported them."""
_programs: dict[tuple[str, tuple[str, ...]], _Program] = {}
"""Every import so far, by the name of the factory's module and the folders it was imported from."""


class UserRecipe(Recipe):
    """A class or function of the user's that makes the module.

    The file's folder and the current folder are importable while it runs; `folder` stands in for the current one.
    """

    def __init__(self, spec: str, folder: str | None) -> None:
        target, colon, name = spec.rpartition(":")
        if not colon or not target or not name:
            raise UsageError(f"cannot read the model {spec!r}; expected FILE.py:FACTORY or pkg.mod:FACTORY")
        self.folder = folder
        self._program: _Program | None = None
        self._parents: dict[str, str] = {}
        self._file = Path(os.path.abspath(target)) if target.endswith(".py") or os.sep in target else None
        if self._file is None:
            self._first, self._last = _existing(folder), []
            self._module = target
        else:
            if not self._file.is_file():
                raise FactoryError(f"no file {self._file}, which {spec!r} names")
            package, root = _package(self._file)
            self._first = [*_existing(str(root)), *_existing(folder)]
            # In a package the folder itself comes after the standard library: a member may be called `types` or `queue`.
            self._last = [str(self._file.parent)] if package else []
            self._module = self._choose_name(package)
        self.factory = f"{self._file or target}:{name}"
        self._name = name
        with self._importing():
            self._callable = self._find(self._import())
        self._set_parameters()
        if self._file is None and all(_is_installed(file.path) for file in self.source_files):
            self.folder = None  # an installed package needs none

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        self._check_args(args)
        with self._importing():
            try:
                module = self._callable(**args)
            except (Exception, SystemExit) as error:  # the user's code: any error may come
                what = f"{type(error).__name__}: {error}"
                raise FactoryError(f"{self.factory} failed: {what}{_where(error)}{self._shadow(error)}") from error
        if not isinstance(module, nn.Module):
            raise FactoryError(f"{self.factory} returned a {type(module).__name__}; expected a torch.nn.Module")
        return module

    def describe(self, module: nn.Module, args: Mapping[str, Any]) -> Interface:
        return Interface()

    def _choose_name(self, package: str | None) -> str:
        """The name under which the file's own neighbours would import it; one of ours where that names something else."""
        assert self._file is not None
        importlib.invalidate_caches()
        path = self._path(sys.path)
        if package and not _is_protected(package.partition(".")[0]) and _means(package, self._file, path):
            return package
        if not package and (name := self._name_in_folder(path)):
            return name
        if not _is_protected(self._file.stem) and _means(self._file.stem, self._file, path):
            return self._file.stem
        return f"{_APART}{self._file.stem}"

    def _name_in_folder(self, path: list[str]) -> str | None:
        """`models.net` for models/net.py under the current folder, where `models` is no package but a mere folder.

        Python lets such a folder yield to any package of its name further down the path. To an installed one it yields
        here too; before any other it comes first, for which `_import` makes the folders modules.
        """
        assert self._file is not None
        if not self.folder or not self._file.is_relative_to(self.folder) or self._file.parent == Path(self.folder):
            return None
        parts = self._file.relative_to(self.folder).with_suffix("").parts
        reached = PathFinder.find_spec(parts[0], path)
        installed = _is_protected(parts[0]) or (reached is not None and _is_installed(reached.origin or ""))
        if installed or not _means(".".join(parts), self._file, self._first):
            return None
        self._parents = {".".join(parts[:count]): str(Path(self.folder, *parts[:count])) for count in range(1, len(parts))}
        return ".".join(parts)

    def _path(self, path: list[str]) -> list[str]:
        installed = next((index for index, entry in enumerate(path) if Path(entry).name in _INSTALLED), len(path))
        return [*self._first, *path[:installed], *self._last, *path[installed:]]

    def _import(self) -> ModuleType:
        try:
            if self._module in sys.modules:
                return sys.modules[self._module]
            for name, folder in self._parents.items():
                sys.modules[name] = _folder_module(name, folder)
            if self._file is None or not self._module.startswith(_APART):
                return importlib.import_module(self._module)
            spec = importlib.util.spec_from_file_location(self._module, self._file)
            assert spec is not None
            assert spec.loader is not None
            module = sys.modules[self._module] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[self._module]
                raise
            return module
        except SyntaxError as error:
            raise FactoryError(f"{error.filename or self._module}:{error.lineno}: {error.msg}") from error
        except ImportError as error:
            raise FactoryError(
                f"cannot import {self._file or self._module}: {error}{_where(error)}{self._hint(error)}"
            ) from error
        except (Exception, SystemExit) as error:  # the user's code: any error may come
            what = f"{type(error).__name__}: {error}"
            raise FactoryError(
                f"{self._file or self._module} fails when it is imported: {what}{_where(error)}{self._shadow(error)}"
            ) from error

    def _hint(self, error: ImportError) -> str:
        if "relative import" in str(error):
            return "\na relative import needs a package: add __init__.py, or run from the folder above"
        if shadow := self._shadow(error):
            return shadow
        if isinstance(error, ModuleNotFoundError) and self.folder:
            return f"\nimportable are what is installed, {self.folder}, and the file's own folder"
        return ""

    def _shadow(self, error: BaseException) -> str:
        """A hint, on a line of its own, where `error` speaks of a module that both the user and the standard library have."""
        if not isinstance(error, ImportError | AttributeError):
            return ""
        spoken = {*re.findall(r"'(\w+)", str(error)), (getattr(error, "name", None) or "").partition(".")[0]}
        for folder in (*self._first, *self._last):
            for name in sorted(spoken & sys.stdlib_module_names):
                for path in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
                    if path.is_file():
                        return (
                            f"\n{path} has the name of the standard library's module {name!r}, and one hides the other: rename it"
                        )
        return ""

    def _find(self, module: ModuleType) -> Callable[..., Any]:
        found: Any = module
        for part in self._name.split("."):
            if not hasattr(found, part):
                known = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
                raise FactoryError(f"{self._file or self._module} has no {self._name!r}{near(part, known)}")
            found = getattr(found, part)
        if isinstance(found, nn.Module):
            raise FactoryError(f"{self.factory} is a module already made; expected a class or function that makes one")
        if not callable(found):
            raise FactoryError(f"{self.factory} is a {type(found).__name__}; expected a class or function that makes a module")
        return found  # type: ignore[no-any-return]

    def _set_parameters(self) -> None:
        try:
            self._signature: inspect.Signature | None = inspect.signature(self._callable)
        except (ValueError, TypeError):  # written in C
            self._signature = None
            self.names_classes = False
            return
        parameters = self._signature.parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self.names_classes = "num_classes" in parameters
        self.takes_classes = self.names_classes or inspect.Parameter.VAR_KEYWORD in kinds
        if self.names_classes:
            default = parameters["num_classes"].default
            self.needs_classes = default is inspect.Parameter.empty
            self.default_classes = default if isinstance(default, int) else None

    def _check_args(self, args: Mapping[str, Any]) -> None:
        if self._signature is not None:
            try:
                self._signature.bind(**args)
            except TypeError as error:
                raise UsageError(
                    f"{self.factory} does not take these arguments: {error}; it is {self._name}{self._signature}"
                    " (--model-arg NAME=VALUE)"
                ) from error

    @contextmanager
    def _importing(self) -> Iterator[None]:
        """sys.path and sys.modules as the user's program has them; on leaving, the process's own again."""
        folders = (*self._first, *self._last)
        key = (self._module, folders)
        with _lock:
            path = list(sys.path)
            hidden = {name: module for name, module in sys.modules.items() if name in _imported or _is_hidden(name, folders)}
            for name in hidden:
                del sys.modules[name]
            if self._program is None:
                known = _programs.get(key, _Program())
                self._program = known if known.is_unchanged() else _Program()
            sys.modules.update(self._program.modules)
            before = set(sys.modules) - set(self._program.modules)
            sys.path[:] = [*self._program.path, *self._path(path)]
            given = set(sys.path)
            importlib.invalidate_caches()
            try:
                yield
            finally:
                added = tuple(entry for entry in sys.path if entry not in given)
                self._note({name: module for name, module in list(sys.modules.items()) if name not in before}, added)
                _programs[key] = self._program
                sys.path[:] = path
                for name, module in hidden.items():
                    if _imported.get(name) is module:
                        sys.modules.setdefault(name, module)
                    else:
                        sys.modules[name] = module  # the process's own
                _imported.update(self._program.modules)

    def _note(self, modules: Mapping[str, ModuleType], added: tuple[str, ...]) -> None:
        """Keep what was imported for the next time, with the digests of the files, and list those files."""
        assert self._program is not None
        user = {name: module for name, module in modules.items() if _is_user(module)}
        digests = dict(self._program.digests)
        for file in filter(None, map(_file_of, user.values())):
            digests.setdefault(file, file_digest(Path(file)))
        self._program = _Program(modules=user, digests=digests, path=(*added, *self._program.path))
        own = _file_of(sys.modules[self._module]) if self._module in sys.modules else None
        files = ({own: digests.get(own) or file_digest(Path(own))} if own else {}) | digests
        self.source_files = tuple(SourceFile(path=path, sha256=digest) for path, digest in files.items())


def _existing(folder: str | None) -> list[str]:
    return [folder] if folder else []


def _package(file: Path) -> tuple[str | None, Path]:
    """Dotted name of a file in a package and the folder that holds the package; None and its own folder otherwise."""
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return (".".join(parts) if folder != file.parent else None), folder


def _means(name: str, file: Path, path: list[str]) -> bool:
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


def _folder_module(name: str, folder: str) -> ModuleType:
    """A namespace package of one folder."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder]
    module = importlib.util.module_from_spec(spec)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _is_protected(top: str) -> bool:
    """Whether a top-level name belongs to the standard library, to us or to what is installed and loaded."""
    if top in sys.stdlib_module_names or top in ("deploy", "__main__"):
        return True
    module = sys.modules.get(top)
    return module is not None and _is_installed(_place(module))


def _is_hidden(name: str, folders: tuple[str, ...]) -> bool:
    """Whether the process's own module `name` would stand in the way of one of the user's."""
    top = name.partition(".")[0]
    if _is_protected(top):
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


def _is_installed(place: str) -> bool:
    real = os.path.realpath(place) + (os.sep if place.endswith(os.sep) else "")
    return any(f"{os.sep}{part}{os.sep}" in real for part in _INSTALLED) or real.startswith(_STDLIB)


def _is_user(module: ModuleType) -> bool:
    place = _place(module)
    if place == os.sep:
        return False  # built in
    return not _is_installed(place) and not os.path.realpath(place).startswith(_OURS)


def _file_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return os.path.abspath(file) if file and os.path.isfile(file) else None


def _where(error: BaseException) -> str:
    """` (FILE:LINE)`, the innermost line of the user's own code in the traceback of `error`; nothing where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if os.path.isfile(f.filename) and not _is_installed(f.filename) and not f.filename.startswith(_OURS)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
