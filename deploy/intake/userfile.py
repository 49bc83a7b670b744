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
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from deploy.artifact.manifest import SourceFile, file_digest
from deploy.errors import FactoryError, UsageError
from deploy.intake.isolation import (
    INSTALLED,
    Program,
    existing,
    file_of,
    folder_module,
    is_hidden,
    is_installed,
    is_protected,
    is_user,
    means,
    package_of,
    where,
)
from deploy.intake.recipe import Interface, Recipe
from deploy.models.errors import near

_APART = "_deploy_user_"
"""Before the name of a file whose own name means something else already."""


_lock = threading.RLock()
_imported: dict[str, ModuleType] = {}
"""The user's modules that stand in sys.modules because we imported them."""
_programs: dict[tuple[str, tuple[str, ...]], Program] = {}
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
        self._program: Program | None = None
        self._parents: dict[str, str] = {}
        self._file = Path(os.path.abspath(target)) if target.endswith(".py") or os.sep in target else None
        if self._file is None:
            self._first, self._last = existing(folder), []
            self._module = target
        else:
            if not self._file.is_file():
                raise FactoryError(f"no file {self._file}, which {spec!r} names")
            package, root = package_of(self._file)
            self._first = [*existing(str(root)), *existing(folder)]
            # In a package the folder itself comes after the standard library: a member may be called `types` or `queue`.
            self._last = [str(self._file.parent)] if package else []
            self._module = self._choose_name(package)
        self.factory = f"{self._file or target}:{name}"
        self._name = name
        with self._importing():
            self._callable = self._find(self._import())
        self._set_parameters()
        if self._file is None and all(is_installed(file.path) for file in self.source_files):
            self.folder = None  # an installed package needs none

    def build(self, args: Mapping[str, Any]) -> nn.Module:
        self._check_args(args)
        with self._importing():
            try:
                module = self._callable(**args)
            except (Exception, SystemExit) as error:  # the user's code: any error may come
                what = f"{type(error).__name__}: {error}"
                raise FactoryError(f"{self.factory} failed: {what}{where(error)}{self._shadow(error)}") from error
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
        if package and not is_protected(package.partition(".")[0]) and means(package, self._file, path):
            return package
        if not package and (name := self._name_in_folder(path)):
            return name
        if not is_protected(self._file.stem) and means(self._file.stem, self._file, path):
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
        installed = is_protected(parts[0]) or (reached is not None and is_installed(reached.origin or ""))
        if installed or not means(".".join(parts), self._file, self._first):
            return None
        self._parents = {".".join(parts[:count]): str(Path(self.folder, *parts[:count])) for count in range(1, len(parts))}
        return ".".join(parts)

    def _path(self, path: list[str]) -> list[str]:
        installed = next((index for index, entry in enumerate(path) if Path(entry).name in INSTALLED), len(path))
        return [*self._first, *path[:installed], *self._last, *path[installed:]]

    def _import(self) -> ModuleType:
        try:
            if self._module in sys.modules:
                return sys.modules[self._module]
            for name, folder in self._parents.items():
                sys.modules[name] = folder_module(name, folder)
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
            raise FactoryError(f"cannot import {self._file or self._module}: {error}{where(error)}{self._hint(error)}") from error
        except (Exception, SystemExit) as error:  # the user's code: any error may come
            what = f"{type(error).__name__}: {error}"
            raise FactoryError(
                f"{self._file or self._module} fails when it is imported: {what}{where(error)}{self._shadow(error)}"
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
            hidden = {name: module for name, module in sys.modules.items() if name in _imported or is_hidden(name, folders)}
            for name in hidden:
                del sys.modules[name]
            if self._program is None:
                known = _programs.get(key, Program())
                self._program = known if known.is_unchanged() else Program()
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
        user = {name: module for name, module in modules.items() if is_user(module)}
        digests = dict(self._program.digests)
        for file in filter(None, map(file_of, user.values())):
            digests.setdefault(file, file_digest(Path(file)))
        self._program = Program(modules=user, digests=digests, path=(*added, *self._program.path))
        own = file_of(sys.modules[self._module]) if self._module in sys.modules else None
        files = ({own: digests.get(own) or file_digest(Path(own))} if own else {}) | digests
        self.source_files = tuple(SourceFile(path=path, sha256=digest) for path, digest in files.items())
