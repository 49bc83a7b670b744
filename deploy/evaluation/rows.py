"""Rows of predictions in a file that grows, JSON Lines or Parquet, from which an interrupted run continues.

Beside `OUT` lies `OUT.run.json`: what was asked for, and whether it is finished. Parquet grows in parts, whole files of their own in
`OUT.parts`, which become one file at the end: a Parquet file without its end cannot be read.
"""

import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from deploy.errors import BackendError, OutputError, UsageError
from deploy.evaluation.batch import Item, Row
from deploy.evaluation.many_options import SUFFIXES
from deploy.evaluation.results import Reader, Result, cells
from deploy.host.extras import missing
from deploy.words import as_utf8

_ROWS_OF_A_PART = 4096
_NUMBERS_OF_A_PART = 1 << 20
_SECONDS_OF_A_PART = 5.0
_OWN_COLUMNS = {"path", "row", "error"}

Done = tuple[str, int | None, bool]
"""Of a row that is there: its path, its row in an `.npz` file, and whether it is an error."""


class RowsFile(ABC):
    """A file of rows. rows, errors: how many it has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self.errors = 0

    @abstractmethod
    def done(self) -> Iterator[Done]:
        """The rows that are there, in order. What was not written to its end is taken away first."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Add rows."""

    @abstractmethod
    def close(self, *, finished: bool) -> None:
        """finished: all rows are there."""

    @abstractmethod
    def clean(self) -> None:
        """Remove what is of no more use once the file is finished."""

    def count(self, rows: Sequence[Row]) -> None:
        self.rows += len(rows)
        self.errors += sum(row.error is not None for row in rows)


class JsonLines(RowsFile):
    """One JSON object on a line, as `Row.to_json` has it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path.open("ab")

    def done(self) -> Iterator[Done]:
        whole = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                found = json.loads(line)
                yield found["path"], found.get("row"), "error" in found
        os.truncate(self.path, whole)

    def write(self, rows: Sequence[Row]) -> None:
        self._file.write(b"".join(msgspec.json.encode(row.to_json()) + b"\n" for row in rows))
        self._file.flush()
        self.count(rows)

    def close(self, *, finished: bool) -> None:
        self._file.close()

    def clean(self) -> None:
        pass


class Parquet(RowsFile):
    """The columns path and row, those of the results, and error. Needs pyarrow."""

    def __init__(self, path: Path, reader: Reader) -> None:
        super().__init__(path)
        self._kind = reader.kind
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise missing(error, str(path)) or BackendError(f"{path} needs pyarrow: {error}") from error
        self._arrow, self._parquet = pyarrow, parquet
        columns = {name: _nested(pyarrow, *column) for name, column in reader.columns.items()}
        self._schema = pyarrow.schema({"path": pyarrow.string(), "row": pyarrow.int64(), **columns, "error": pyarrow.string()})
        self._folder = path.with_name(path.name + ".parts")
        self._folder.mkdir(exist_ok=True)
        self._held: list[Row] = []
        self._numbers = 0
        self._written = time.monotonic()

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.parquet"))

    def done(self) -> Iterator[Done]:
        for part in self._parts():
            table = self._parquet.read_table(part, columns=["path", "row", "error"])
            for found in table.to_pylist():
                yield found["path"], found["row"], found["error"] is not None

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._held.append(row)
            self._numbers += 0 if row.result is None else row.result.numbers
            if len(self._held) >= _ROWS_OF_A_PART or self._numbers >= _NUMBERS_OF_A_PART:
                self._write_part()
        self.count(rows)
        if time.monotonic() - self._written > _SECONDS_OF_A_PART:
            self._write_part()

    def _write_part(self) -> None:
        if not self._held:
            return
        listed = []
        for row in self._held:
            found = {} if row.result is None else cells(self._kind, row.result.values)
            listed.append({"path": row.path, "row": row.row, "error": row.error, **found})
        half = self._folder / "unfinished"
        self._parquet.write_table(self._arrow.Table.from_pylist(listed, schema=self._schema), half)
        half.rename(self._folder / f"{len(self._parts()):08d}.parquet")
        self._held, self._numbers, self._written = [], 0, time.monotonic()

    def close(self, *, finished: bool) -> None:
        self._write_part()
        if finished:
            half = self._folder / "unfinished"
            with self._parquet.ParquetWriter(half, self._schema) as writer:
                for part in self._parts():
                    writer.write_table(self._parquet.read_table(part))
            half.rename(self.path)

    def clean(self) -> None:
        shutil.rmtree(self._folder)


def _nested(arrow: Any, kind: str, lists: int) -> Any:
    """A type of pyarrow: a value in as many lists."""
    made = {"string": arrow.string(), "bool": arrow.bool_()}.get(kind) or arrow.from_numpy_dtype(kind)
    for _ in range(lists):
        made = arrow.list_(made)
    return made


def check_out(path: Path, reader: Reader) -> None:
    """Raise UsageError for a name whose suffix is not known, or which cannot hold the results, and OutputError for no folder."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} must end with {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise OutputError(f"no folder at {path.parent}")
    taken = _OWN_COLUMNS & reader.columns.keys()
    if taken and path.suffix.lower() == ".parquet":
        raise UsageError(
            f"an output is called {min(taken)!r}, as a column of {path} is: write .jsonl, or export the model with another --output"
        )


class Run:
    """The file of one run of predictions, new or continued. request: what tells whether it is the same run.

    Masks lie in `OUT.masks`, by the number of their row. Raises OutputError for a file that is of something else.
    """

    def __init__(self, out: Path, request: Mapping[str, Any], reader: Reader) -> None:
        check_out(out, reader)
        self._masks = out.with_name(out.name + ".masks")
        self._note = out.with_name(out.name + ".run.json")
        self._request = dict(request)
        noted = self._read()
        if noted is None and out.exists():
            raise OutputError(f"{out} is there already, and is not of `deploy predict`: remove it, or choose another name")
        if noted is not None and noted["request"] != self._request:
            keys = dict.fromkeys((*self._request, *noted["request"]))
            changed = ", ".join(key for key in keys if noted["request"].get(key) != self._request.get(key))
            raise OutputError(f"{out} is of another run ({changed}): remove it and {self._note.name}, or choose another name")
        self.finished: dict[str, int] | None = noted["finished"] if noted else None
        """The counts of a run that has been finished before: `rows` and `errors`."""
        if self.finished is not None and not out.exists():
            self.finished = None
        if self.finished is None:
            self._write(None)
            self.file: RowsFile = Parquet(out, reader) if out.suffix.lower() == ".parquet" else JsonLines(out)

    def _read(self) -> Any:
        try:
            return json.loads(self._note.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{self._note} cannot be read: {error}") from error

    def _write(self, finished: Mapping[str, int] | None) -> None:
        half = self._note.with_name(self._note.name + ".unfinished")
        half.write_text(json.dumps({"request": self._request, "finished": finished}, indent=2), encoding="utf-8")
        half.rename(self._note)

    def left(self, paths: Iterator[Path]) -> Iterator[Item]:
        """What is left to do of `paths`, which come in the same order as before, and without the masks of this run.

        Raises OutputError where they do not.
        """
        own = os.path.join(os.path.abspath(self._masks), "")
        paths = (path for path in paths if not os.path.abspath(path).startswith(own))
        last: tuple[Path, int] | None = None  # an .npz file, whose rows may not be all there, and how many are
        found = None
        for path, row, is_error in self.file.done():
            self.file.rows += 1
            self.file.errors += is_error
            if last is not None and path == as_utf8(last[0]) and row in (last[1], None):
                last = None if row is None else (last[0], row + 1)  # None: the rest of it failed
                continue
            found = next(paths, None)
            if found is None or as_utf8(found) != path:
                raise OutputError(
                    f"{self.file.path} continues with {path}, and the sources with {found}: the files have changed; remove"
                    f" {self.file.path.name} and {self._note.name} to begin anew"
                )
            last = None if row is None else (found, 1)
        if last is not None:
            yield Item(path=last[0], start=last[1])
        for each in paths:
            yield Item(path=each)

    def write(self, rows: Sequence[Row]) -> None:
        """Add rows, and write their masks before. Raises OutputError."""
        self.file.write([self._with_mask(row, index) for index, row in enumerate(rows, self.file.rows)])

    def _with_mask(self, row: Row, index: int) -> Row:
        if row.result is None or row.result.mask is None:
            return row
        path = self._masks / f"{index:08d}.png"
        try:
            self._masks.mkdir(exist_ok=True)
            path.write_bytes(row.result.mask)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        return replace(row, result=Result(values={**row.result.values, "mask": as_utf8(path)}))

    def finish(self) -> None:
        self.file.close(finished=True)
        self._write({"rows": self.file.rows, "errors": self.file.errors})
        self.file.clean()
