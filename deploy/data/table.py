"""The table beside the images of a folder: what else a model takes of each image.

A folder of images holds `metadata.csv` or `metadata.parquet`, as in the ImageFolder of Hugging Face's `datasets`: the column
`file_name` has the path of an image from that folder on, and further columns its values.
"""

import csv
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import BackendError, DataError
from deploy.host.extras import missing
from deploy.words import printable

STEM = "metadata"
FILE_NAME = "file_name"
TABLES = tuple(STEM + suffix for suffix in (".csv", ".parquet"))

Row = Mapping[str, Any]
"""Cells by column: text where the table is CSV, Python values and lists where it is Parquet."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a table, by the path of the image: the folder of the table and `file_name`, absolute."""

    path: Path
    columns: tuple[str, ...]
    rows: Mapping[Path, Row]


def find_table(folder: Path) -> Path | None:
    """The table in `folder`, None where there is none. Raises DataError for two of them."""
    found = [folder / name for name in TABLES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} holds {' and '.join(TABLES)}; keep one of them")
    return found[0] if found else None


def read_table(path: Path) -> Table:
    """All rows of a table.

    Raises DataError for a file that is damaged, lacks the column `file_name`, or has two rows for an image, and BackendError
    for Parquet where pyarrow is not installed.
    """
    columns, read = _csv(path) if path.suffix == ".csv" else _parquet(path)
    if FILE_NAME not in columns:
        raise DataError(
            f"{path} has the columns {', '.join(columns) or 'none'}; expected {FILE_NAME} and one for each further input"
        )
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path} has two columns called {twice[0]!r}")
    rows: dict[Path, Row] = {}
    for number, row in enumerate(read, 1):
        name = row[FILE_NAME]
        if not isinstance(name, str) or not name:
            raise DataError(f"{path}: row {number} has no {FILE_NAME}")
        image = normal(path.parent / name)
        if image in rows:
            raise DataError(f"{path} has two rows for {printable(name)}")
        rows[image] = row
    return Table(path=path, columns=columns, rows=rows)


def normal(path: Path) -> Path:
    """`path` from the root on, without `.` and `..`, as tables and folders are compared."""
    return Path(os.path.abspath(path))


def _csv(path: Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    try:
        # A name of a file that is not UTF-8 is read as the file system gives it; a byte order mark is what spreadsheets write.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    head, *body = [line for line in lines if line] or [[]]
    wrong = next((number for number, line in enumerate(body, 1) if len(line) != len(head)), None)
    if wrong is not None:
        raise DataError(f"{path}: row {wrong} has {len(body[wrong - 1])} cells, and there are {len(head)} columns")
    return tuple(name.strip() for name in head), (dict(zip((name.strip() for name in head), line, strict=True)) for line in body)


def _parquet(path: Path) -> tuple[tuple[str, ...], Iterator[Row]]:
    try:
        from pyarrow import ArrowException, parquet  # of the extra `parquet`, and needed for such tables alone
    except ImportError as error:
        raise missing(error, str(path)) or BackendError(f"{path} needs pyarrow: {error}") from error
    try:
        table = parquet.read_table(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
    return tuple(table.column_names), iter(table.to_pylist())
