"""What a batch of predictions is made of: files, folders, patterns, and lists of paths, read as they are needed.

Paths come one by one in a fixed order, so that any number of them takes no more memory than the names in one folder, or of one
pattern.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.calibration import imagefolder, npzfolder
from deploy.errors import BackendError, DataError
from deploy.host.extras import missing
from deploy.words import printable

LISTS = (".txt", ".parquet")
"""The suffixes of lists of paths: one on a line, or in the column `path` (or `file_name`, or the only one)."""

_PATTERN = re.compile(r"[*?\[]")
_COLUMNS = ("path", "file_name")
_ROWS = 4096


def check_sources(sources: Sequence[str]) -> None:
    """Raise DataError for a source that is not there, before the work begins, and BackendError for Parquet without pyarrow."""
    if not sources:
        raise DataError("no source was named")
    for source in sources:
        path = Path(source)
        if path.suffix.lower() == ".parquet":
            _column(path)
        matched = _PATTERN.search(source) and next(glob.iglob(source, recursive=True), None)
        if not path.exists() and not matched:
            raise DataError(f"nothing is at {printable(source)}")


def paths_of(sources: Sequence[str]) -> Iterator[Path]:
    """The images and `.npz` files of all sources, in order: folders at any depth by name, patterns and lists as they are.

    What a list or a command line names is given whether it is there or not. Raises DataError for a list or folder that cannot be read.
    """
    for source in sources:
        yield from _files(source)


def is_npz(path: Path) -> bool:
    return path.suffix.lower() == npzfolder.SUFFIX


def _files(source: str) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        yield from _under(path)
    elif path.suffix.lower() == ".txt":
        yield from (_listed(path, line) for line in _lines(path))
    elif path.suffix.lower() == ".parquet":
        yield from (_listed(path, name) for name in _names(path))
    elif path.exists() or not _PATTERN.search(source):
        yield path
    else:
        for each in sorted(glob.glob(source, recursive=True)):
            yield from _under(Path(each)) if os.path.isdir(each) else (Path(each),)


def _under(folder: Path) -> Iterator[Path]:
    """The files of a folder, then those of its folders, by name. Hidden ones are left out."""
    entered: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        if real not in entered:
            for name in sorted(names):
                path = Path(parent, name)
                if not name.startswith(".") and (imagefolder.is_image(path) or is_npz(path)):
                    yield path
        entered.add(real)


def _listed(of: Path, name: str) -> Path:
    """A path in a list: from the current folder on, or where it is not there, from that of the list."""
    path = Path(name)
    return path if path.is_absolute() or path.exists() or not (of.parent / path).exists() else of.parent / path


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for line in file:
                if name := line.rstrip("\r\n"):
                    yield name
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error


def _column(path: Path) -> str:
    """The column of a Parquet file that has the paths."""
    columns = _open(path).schema_arrow.names
    found = [name for name in _COLUMNS if name in columns] or (columns if len(columns) == 1 else [])
    if not found:
        raise DataError(f"{printable(path)} has the columns {', '.join(columns)}; expected one called {' or '.join(_COLUMNS)}")
    return str(found[0])


def _names(path: Path) -> Iterator[str]:
    column = _column(path)
    for batch in _open(path).iter_batches(batch_size=_ROWS, columns=[column]):
        for name in batch.column(0).to_pylist():
            if not isinstance(name, str) or not name:
                raise DataError(f"{printable(path)}: the column {column!r} has {name!r}, which is no path")
            yield name


def _open(path: Path):  # type: ignore[no-untyped-def]  # pyarrow has no types
    try:
        from pyarrow import ArrowException, parquet  # of the extra `parquet`, and needed for such lists alone
    except ImportError as error:
        raise missing(error, str(path)) or BackendError(f"{path} needs pyarrow: {error}") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{printable(path)} cannot be read as Parquet: {error}") from error
