"""The user's modules, imported apart from the rest of the process.

A project may have a `models` or a `utils` while the program that embeds us has others of these names. The user's modules
are therefore imported afresh, unless no file has changed since the last import, so that the digests in the manifest are
those of the code that ran; afterwards the process has its own modules back.
"""

import importlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from deploy.artifact.manifest import SourceFile, file_digest
from deploy.artifact.usercode import INSTALLED, is_installed, user_line
from deploy.errors import FactoryError

_PACKAGE = "deploy"

_PREFIX = "_deploy_user_"
"""Comes before the name of a file when another module already has that name."""


@dataclass(frozen=True, kw_only=True)
class _Program:
    """The user's modules by name, the SHA-256 of their files by path, and the folders that they added to sys.path."""

    modules: Mapping[str, ModuleType] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    path: tuple[str, ...] = ()

    def is_unchanged(self) -> bool:
        return all(os.path.isfile(file) and file_digest(Path(file)) == digest for file, digest in self.digests.items())


_lock = threading.RLock()
_imported: dict[str, ModuleType] = {}
"""The user's modules that are in sys.modules because we imported them."""
_programs: dict[tuple[str, tuple[str, ...]], _Program] = {}
"""Every import until now, by the name of the factory's module and the folders it was imported from."""


class UserModules:
    """The module of a user's factory, and the modules that it imports.

    source: the factory's file, or the dotted name of its module.
    folder: importable beside the file's own folder; the current folder in most cases.
    source_files: the user's files that were imported until now, the factory's own first.
    """

    source_files: tuple[SourceFile, ...] = ()

    def __init__(self, source: Path | str, folder: str | None) -> None:
        self.source = source
        self._folder = folder
        self._program: _Program | None = None
        self._parents: dict[str, str] = {}
        """Folders above the file that are made modules before it is imported, by the names of these modules."""
        folders = [folder] if folder else []
        self._first, self._last = folders, list[str]()
        if isinstance(source, str):
            self._name = source
            return
        package, root = _package_of(source)
        self._first = [str(root), *folders]
        # In a package the folder itself comes after the standard library: a member may be called `types` or `queue`.
        self._last = [str(source.parent)] if package else []
        self._name = self._choose_name(source, package)

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Makes sys.path and sys.modules those of the user's program, and restores the process's own at the end."""
        folders = (*self._first, *self._last)
        key = (self._name, folders)
        with _lock:
            path = list(sys.path)
            hidden = {name: module for name, module in sys.modules.items() if name in _imported or _is_in_the_way(name, folders)}
            for name in hidden:
                del sys.modules[name]
            if self._program is None:
                known = _programs.get(key, _Program())
                self._program = known if known.is_unchanged() else _Program()
            sys.modules.update(self._program.modules)
            before = set(sys.modules) - set(self._program.modules)
            sys.path[:] = [*self._program.path, *self._search_path(path)]
            given = set(sys.path)
            importlib.invalidate_caches()
            try:
                yield
            finally:
                added = tuple(entry for entry in sys.path if entry not in given)
                new = {name: module for name, module in list(sys.modules.items()) if name not in before}
                self._program = _extended(self._program, new, added)
                self.source_files = self._list_files(self._program)
                _programs[key] = self._program
                sys.path[:] = path
                for name, module in hidden.items():
                    if _imported.get(name) is module:
                        sys.modules.setdefault(name, module)
                    else:
                        sys.modules[name] = module  # the process's own
                _imported.update(self._program.modules)

    def load(self) -> ModuleType:
        """The factory's module. To be called in the block of `importable`.

        Raises FactoryError with the line of the user's code that fails.
        """
        try:
            return self._import()
        except SyntaxError as error:
            raise FactoryError(f"{error.filename or self._name}:{error.lineno}: {error.msg}") from error
        except ImportError as error:
            raise FactoryError(f"cannot import {self.source}: {error}{user_line(error)}{self._import_hint(error)}") from error
        except (Exception, SystemExit) as error:  # the user's code: any error may come
            what = f"{type(error).__name__}: {error}"
            raise FactoryError(
                f"{self.source} fails when it is imported: {what}{user_line(error)}{self.shadow_hint(error)}"
            ) from error

    def shadow_hint(self, error: BaseException) -> str:
        """A hint, on a separate line, if `error` names a module that both the user and the standard library have."""
        if not isinstance(error, ImportError | AttributeError):
            return ""
        named = {*re.findall(r"'(\w+)", str(error)), (getattr(error, "name", None) or "").partition(".")[0]}
        for folder in (*self._first, *self._last):
            for name in sorted(named & sys.stdlib_module_names):
                for path in (Path(folder, f"{name}.py"), Path(folder, name, "__init__.py")):
                    if path.is_file():
                        return (
                            f"\n{path} has the name of the standard library's module {name!r}, and one hides the other: rename it"
                        )
        return ""

    def _import_hint(self, error: ImportError) -> str:
        if "relative import" in str(error):
            return "\na relative import needs a package: add __init__.py, or run from the folder above"
        if hint := self.shadow_hint(error):
            return hint
        if isinstance(error, ModuleNotFoundError) and self._folder:
            return f"\nimportable are what is installed, {self._folder}, and the file's own folder"
        return ""

    def _import(self) -> ModuleType:
        if self._name in sys.modules:
            return sys.modules[self._name]
        for name, folder in self._parents.items():
            sys.modules[name] = _namespace_module(name, folder)
        if not self._name.startswith(_PREFIX):
            return importlib.import_module(self._name)
        spec = importlib.util.spec_from_file_location(self._name, self.source)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[self._name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[self._name]
            raise
        return module

    def _choose_name(self, file: Path, package: str | None) -> str:
        """The name under which the file's neighbours would import it; a name of ours if that one is another module's."""
        importlib.invalidate_caches()
        path = self._search_path(sys.path)
        if package and not _is_reserved(package.partition(".")[0]) and _imports_file(package, file, path):
            return package
        if not package and (name := self._name_in_folder(file, path)):
            return name
        if not _is_reserved(file.stem) and _imports_file(file.stem, file, path):
            return file.stem
        return f"{_PREFIX}{file.stem}"

    def _name_in_folder(self, file: Path, path: list[str]) -> str | None:
        """`models.net` for models/net.py under the current folder, if `models` is a plain folder without `__init__.py`.

        Python prefers any package of that name, wherever on the path, to such a folder. Here only an installed package is
        preferred: to make the folder come before any other, `_import` makes modules of the folders in `_parents`.
        """
        if not self._folder or not file.is_relative_to(self._folder) or file.parent == Path(self._folder):
            return None
        parts = file.relative_to(self._folder).with_suffix("").parts
        spec = PathFinder.find_spec(parts[0], path)
        installed = _is_reserved(parts[0]) or (spec is not None and is_installed(spec.origin or ""))
        if installed or not _imports_file(".".join(parts), file, self._first):
            return None
        self._parents = {".".join(parts[:count]): str(Path(self._folder, *parts[:count])) for count in range(1, len(parts))}
        return ".".join(parts)

    def _search_path(self, path: list[str]) -> list[str]:
        """`path` with the user's folders: most come first, those in `_last` just before what is installed."""
        installed = next((index for index, entry in enumerate(path) if Path(entry).name in INSTALLED), len(path))
        return [*self._first, *path[:installed], *self._last, *path[installed:]]

    def _list_files(self, program: _Program) -> tuple[SourceFile, ...]:
        own = _file_of(sys.modules[self._name]) if self._name in sys.modules else None
        digests = {own: program.digests.get(own) or file_digest(Path(own))} if own else {}
        digests |= program.digests
        return tuple(SourceFile(path=path, sha256=digest) for path, digest in digests.items())


def _extended(program: _Program, modules: Mapping[str, ModuleType], added: tuple[str, ...]) -> _Program:
    """`program` after an import: `modules` are those that it has or has now imported, `added` the new folders of sys.path."""
    user = {name: module for name, module in modules.items() if _is_user_module(name, module)}
    digests = dict(program.digests)
    for file in filter(None, map(_file_of, user.values())):
        digests.setdefault(file, file_digest(Path(file)))
    return _Program(modules=user, digests=digests, path=(*added, *program.path))


def _package_of(file: Path) -> tuple[str | None, Path]:
    """The dotted name of a file in a package, and the folder that holds the package; else None and the file's folder."""
    parts = [] if file.stem == "__init__" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return (".".join(parts) if folder != file.parent else None), folder


def _imports_file(name: str, file: Path, path: list[str]) -> bool:
    """Whether `import name` with sys.path `path` would run `file`. Runs nothing."""
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


def _namespace_module(name: str, folder: str) -> ModuleType:
    """A namespace package that consists of one folder."""
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder]
    module = importlib.util.module_from_spec(spec)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def _is_reserved(top: str) -> bool:
    """Whether a top-level name belongs to the standard library, to us, or to an installed module that is loaded."""
    if top in sys.stdlib_module_names or top in (_PACKAGE, "__main__"):
        return True
    module = sys.modules.get(top)
    return module is not None and is_installed(_location(module))


def _is_in_the_way(name: str, folders: tuple[str, ...]) -> bool:
    """Whether the process has a module `name` where the user's program would import one from `folders`."""
    top = name.partition(".")[0]
    if _is_reserved(top):
        return False
    return any(
        os.path.isfile(os.path.join(folder, top + ".py")) or os.path.isdir(os.path.join(folder, top)) for folder in folders
    )


def _is_user_module(name: str, module: ModuleType) -> bool:
    location = _location(module)
    built_in = location == os.sep
    return not built_in and name.partition(".")[0] != _PACKAGE and not is_installed(location)


def _location(module: ModuleType) -> str:
    """The file of a module, or the first folder of a namespace package, which then ends in a slash."""
    return _file_name(module) or str(next(iter(getattr(module, "__path__", ())), "")) + os.sep


def _file_of(module: ModuleType) -> str | None:
    file = _file_name(module)
    return os.path.abspath(file) if file and os.path.isfile(file) else None


def _file_name(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "")
