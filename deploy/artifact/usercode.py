"""Functions of the user's that are part of an artifact: `FILE.py:FUNCTION`, copied into it, or `pkg.mod:FUNCTION`, imported.

A file is one file: it may import what is installed, and not what lies beside it, for only its own copy goes with the
artifact. It runs from the artifact, never from where it was written, and only if its SHA-256 is the one in the manifest.
Nothing runs until the function is needed; opening, inspecting and verifying an artifact never do.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deploy.errors import ArtifactError, DeployError, UsageError, UserCodeError
from deploy.host.versions import version_of_module
from deploy.words import a_type, did_you_mean

logger = logging.getLogger(__name__)

INSTALLED = ("site-packages", "dist-packages")
_STDLIB = tuple(os.path.realpath(sysconfig.get_path(name)) + os.sep for name in ("stdlib", "platstdlib"))
_PACKAGE_FOLDER = str(Path(__file__).resolve().parents[1]) + os.sep

_lock = threading.RLock()
_loaded: dict[tuple[str | None, ...], Callable[..., Any]] = {}
"""Every function that was loaded, by the file it was loaded from, its SHA-256 and its name."""
_origins: dict[str, str] = {}
"""Where a file was copied from in this process, by the absolute path of the copy: errors name the user's own file and lines."""


@dataclass(frozen=True, kw_only=True)
class UserFunction:
    """A function of the user's as a manifest records it.

    name: in its module; `Class.method` for a member. file: the name of its file in the artifact; None for a function that is
    imported. module: the dotted name of the module that is imported; None for a file. sha256: of the file, or of the module's
    file; None for a module without one. version: of the distribution that the module comes in; None where that is not known.
    """

    name: str
    file: str | None = None
    module: str | None = None
    sha256: str | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.module is None):
            raise UsageError(f"the function {self.name!r} must be in a file or in a module, and in one of them")
        if self.file is not None and (Path(self.file).name != self.file or not self.file.endswith(".py")):
            raise UsageError(f"the file of the function {self.name!r} must be the plain name of a .py file, not {self.file!r}")

    def __str__(self) -> str:
        return f"{self.file or self.module}:{self.name}"

    @classmethod
    def read(cls, spec: str) -> "UserFunction":
        """The record of `FILE.py:FUNCTION` or `pkg.mod:FUNCTION`. Imports a module, and runs no file.

        Raises UsageError, and UserCodeError for a file that needs what lies beside it and a module that cannot be imported.
        """
        source, name = split_spec(spec, "the function", "FUNCTION")
        if isinstance(source, Path):
            if source.suffix != ".py" or not source.is_file():
                raise UsageError(f"no Python file {source}, which {spec!r} names")
            content = source.read_bytes()
            _check_alone(source, content)
            return cls(name=name, file=source.name, sha256=hashlib.sha256(content).hexdigest())
        module = _import(source, f"{spec!r} names")
        function = cls(name=name, module=source, sha256=_digest_of(module), version=_version_of(module))
        function.load(None)
        return function

    def copy(self, source: Path, target: Path) -> None:
        """Copy the file from one folder to another; nothing for a module. Raises ArtifactError where it is not what it was."""
        if self.file is not None:
            (target / self.file).write_bytes(self._content(source))
            _origins[os.path.abspath(target / self.file)] = _origin(source / self.file)

    def load(self, folder: Path | None) -> Callable[..., Any]:
        """The function, from the file in `folder` or the module. Runs the user's code, once a process.

        Raises ArtifactError for a file that is missing or damaged, UserCodeError for code that fails, and where the function
        or the module is missing.
        """
        home = os.path.abspath(folder) if self.file is not None and folder is not None else None
        key = (home, self.file, self.module, self.sha256, self.name)
        with _lock:
            if key not in _loaded:
                if self.file is not None:
                    assert folder is not None
                    module = _run(Path(os.path.abspath(folder), self.file), self._content(folder))
                else:
                    assert self.module is not None
                    wanted = f" (version {self.version})" if self.version else ""
                    module = _import(self.module, "the artifact names, and does not hold", wanted)
                    self._compare(module)
                found = member(module, self.name, self.file or str(self.module), UserCodeError)
                if not callable(found):
                    raise UserCodeError(f"{self} is {a_type(found)}; expected a function")
                _loaded[key] = found
            return _loaded[key]

    def call(self, folder: Path | None, *arguments: Any) -> Any:
        """What the function returns. Raises what `load` raises, and UserCodeError, with the line, where it fails."""
        function = self.load(folder)
        try:
            result = function(*arguments)
        except (Exception, SystemExit) as error:  # the user's code: any error may come
            where = user_line(error, _file_of(function)) or self.line(folder)  # a call that does not fit has no line within
            text = f"{self} fails: {type(error).__name__}: {error}{where}"
            raise UserCodeError(_of_origin(text, error, folder, self.file)) from error
        if inspect.iscoroutine(result):
            result.close()  # Python warns of one that is never awaited
            raise UserCodeError(f"{self} is an async function{self.line(folder)}; expected one that returns its result")
        return result

    def line(self, folder: Path | None) -> str:
        """` (FILE:LINE)`, where the function, or the `__call__` of an object, is defined; "" where that is not known."""
        function = self.load(folder)
        code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
        return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""

    def _content(self, folder: Path) -> bytes:
        assert self.file is not None
        path = folder / self.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path}, which has the function {self.name!r}, cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise ArtifactError(f"{path} has changed: its SHA-256 is not the one of {self}; make the artifact again")
        return content

    def _compare(self, module: ModuleType) -> None:
        """Log a warning where the module's file is another than the one that was recorded."""
        if _digest_of(module) != self.sha256:
            now = _version_of(module)
            versions = f": version {now or 'unknown'}, and it was {self.version or 'unknown'}" if now != self.version else ""
            logger.warning("the file of %s is another than the one that the artifact was made with%s", self, versions)


def split_spec(spec: str, what: str, part: str) -> tuple[Path | str, str]:
    """The absolute path of the file, or the dotted name of the module, and the name in it. Raises UsageError.

    what, part: what is named, and what its part is called in the error.
    """
    target, colon, name = spec.rpartition(":")
    if not colon or not target or not name:
        raise UsageError(f"cannot read {what} {spec!r}; expected FILE.py:{part} or pkg.mod:{part}")
    if not target.endswith(".py") and os.sep not in target:
        return target, name
    return Path(os.path.abspath(target)), name


def member(module: ModuleType, name: str, source: Path | str, error: type[DeployError]) -> Any:
    """What `name`, dotted for a member of a member, is in a module that was read from `source`. Raises `error` for nothing."""
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [known for known, each in vars(value).items() if callable(each) and not known.startswith("_")]
            raise error(f"{source} has no {name!r}{did_you_mean(part, known)}")
        value = getattr(value, part)
    return value


def is_installed(location: str) -> bool:
    """Whether a file, or a folder that ends in a slash, belongs to the standard library or to an installed package."""
    real = os.path.realpath(location) + (os.sep if location.endswith(os.sep) else "")
    return any(f"{os.sep}{part}{os.sep}" in real for part in INSTALLED) or real.startswith(_STDLIB)


def user_line(error: BaseException, file: str | None = None) -> str:
    """` (FILE:LINE)`, the innermost line of the user's code in the traceback of `error`; empty if there is none.

    file: where the user's code is, even if that is an installed package.
    """
    files = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [(name, line) for name, line in files if os.path.isfile(name) and not is_installed(name) and not _is_ours(name)]
    own = own or [(name, line) for name, line in files if name == file]
    return f" ({own[-1][0]}:{own[-1][1]})" if own else ""


def _is_ours(file: str) -> bool:
    return file.startswith(_PACKAGE_FOLDER)


def _file_of(function: Callable[..., Any]) -> str | None:
    module = sys.modules.get(getattr(function, "__module__", None) or type(function).__module__)
    file = getattr(module, "__file__", None)
    return _origins.get(file, file) if file else None


def _digest_of(module: ModuleType) -> str | None:
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and os.path.isfile(file) else None


def _version_of(module: ModuleType) -> str | None:
    """The version of the distribution that an installed module comes in; None where that is not known."""
    return version_of_module(module.__name__) if is_installed(getattr(module, "__file__", None) or "") else None


def _run(path: Path, content: bytes) -> ModuleType:
    """A module of the `content` of the file at `path`; nothing is written beside it."""
    name = f"_deploy_code_{path.stem}_{hashlib.sha256(os.fsencode(path) + content).hexdigest()[:12]}"
    module = sys.modules[name] = ModuleType(name)  # dataclasses, for one, look for their module there
    module.__file__ = str(path)
    try:
        exec(compile(content, _origin(path), "exec", dont_inherit=True), module.__dict__)  # noqa: S102  (what it is for)
    except (Exception, SystemExit) as error:  # the user's code: any error may come
        del sys.modules[name]
        text = _import_error(_origin(path), error)
        raise UserCodeError(_of_origin(text, error, path.parent, path.name)) from error
    return module


def _origin(path: Path) -> str:
    """The file that the one at `path` was copied from, or that itself."""
    place = os.path.abspath(path)
    return _origins.get(place, place)


def _of_origin(text: str, error: BaseException, folder: Path | None, file: str | None) -> str:
    """`text` with the folder that a file was copied from in place of `folder`, and why a file beside it is not found."""
    if folder is None or file is None:
        return text
    home = os.path.abspath(folder)
    lost = isinstance(error, OSError) and str(error.filename).startswith(home + os.sep)
    hint = f"\n{file} alone goes into the artifact, and nothing that lies beside it" if lost else ""
    return text.replace(home + os.sep, os.path.dirname(_origin(folder / file)) + os.sep) + hint


def _import(name: str, who: str, wanted: str = "") -> ModuleType:
    """Import a module, which `who`; the current folder is importable meanwhile. wanted: its version, for the error."""
    try:
        with _current_folder():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserCodeError(_import_error(name, error)) from error
        raise UserCodeError(
            f"no module {name!r} to import, which {who}; it must be installed{wanted} or in the current folder, {os.getcwd()}"
        ) from error
    except (Exception, SystemExit) as error:  # the user's code: any error may come
        raise UserCodeError(_import_error(name, error)) from error


def _import_error(source: str, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename or source}:{error.lineno}: {error.msg}"
    return f"{source} fails when it is imported: {type(error).__name__}: {error}{user_line(error)}"


@contextmanager
def _current_folder() -> Iterator[None]:
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _check_alone(file: Path, content: bytes) -> None:
    """Raise UserCodeError for a file that imports what lies beside it; log a warning for what is found and not installed."""
    try:
        tree = ast.parse(content, str(file))
    except (SyntaxError, ValueError) as error:
        raise UserCodeError(f"{file}:{getattr(error, 'lineno', 1)}: {getattr(error, 'msg', error)}") from error
    for name, line in _imports(tree):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "deploy":
            continue
        found = _place(top)
        beside = (file.parent / f"{top}.py").is_file() or (file.parent / top).is_dir()
        if (
            not top
            or (found is None and beside)
            or (found and Path(found).is_relative_to(file.parent) and not is_installed(found))
        ):
            raise UserCodeError(
                f"{file}:{line} imports {name or '.'!r} from beside it, and the artifact takes {file.name} alone: put all of it into"
                " one file, or install it as a package and name pkg.mod:FUNCTION"
            )
        if found and not is_installed(found):
            logger.warning("%s:%d imports %s (%s), which is not in the artifact: it must be importable", file, line, top, found)


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The absolute name of every module that a program imports, "" for a relative one, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("" if node.level else node.module or ""), node.lineno


def _place(top: str) -> str | None:
    """The file of a top-level module, or its folder and a slash; None where it is not found, "" where it has none."""
    try:
        with _current_folder():
            spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module that was made in memory has no spec
        return ""
    if spec is None:
        return None
    folder = next(iter(spec.submodule_search_locations or ()), None)
    return folder + os.sep if folder else spec.origin if spec.has_location else ""
