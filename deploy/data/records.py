"""What a model takes of one image: the image as its input, and the values of its other inputs from the table beside it."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, TensorSpec, format_shape
from deploy.data.images import ImageInput, batch_size, image_inputs
from deploy.data.table import FILE_NAME, TABLES, Row, Table, find_table, normal, read_table
from deploy.errors import DataError, UsageError
from deploy.words import printable

_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class RecordInput:
    """All inputs of a model, of image files: `images` has those that images become, first that of the file itself.

    tables: those of the folders that the images are in; none where the model takes nothing but the image.
    values: the inputs that are numbers in the tables.
    """

    images: tuple[ImageInput, ...]
    tables: tuple[Table, ...] = ()
    values: tuple[TensorSpec, ...] = ()
    _rows: dict[Path, tuple[Table, Row]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for table in self.tables:
            self._rows.update({path: (table, row) for path, row in table.rows.items()})

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (*(image.spec for image in self.images), *self.values)

    def load(self, path: Path) -> Feed:
        """The inputs that belong to an image file, each of the dtype that the model takes, without the batch dimension.

        Raises DataError with the name of an image that cannot be read or has no row, or of a cell that is not what the model
        takes, and UsageError for an array that does not fit the input.
        """
        first, *others = self.images
        found = {first.spec.name: first.load(path)}
        if others or self.values:
            if (entry := self._rows.get(normal(path))) is None:
                raise DataError(f"{printable(path)} has no row in {' or '.join(str(table.path) for table in self.tables)}")
            table, row = entry
            for image in others:
                found[image.spec.name] = _named_image(table, row, image)
            for spec in self.values:
                found[spec.name] = _values(table, row, spec)
        return {spec.name: found[spec.name].astype(spec.dtype, copy=False) for spec in self.specs}

    def missing(self, files: Sequence[Path]) -> list[DataError]:
        """An error for each row of the tables whose image is neither among `files` nor anywhere."""
        there = {normal(path) for path in files}
        return [
            DataError(f"no image at {printable(path)}, which {table.path} has a row for")
            for path, (table, _) in self._rows.items()
            if path not in there and not path.exists()
        ]

    def batch_size(self, wanted: int) -> tuple[int, str]:
        """The batch size to use in place of `wanted`, and the reason if it is another, else "".

        Raises UsageError if `wanted` is below 1.
        """
        dynamic = next((spec.name for spec in self.values if any(isinstance(dim, str) for dim in spec.shape[1:])), None)
        singly = "" if all(image.of_one_size for image in self.images) else "the preprocessing leaves them in many sizes"
        return batch_size(self.specs[0], wanted, singly or (f"{dynamic!r} may be of many sizes" if dynamic else ""))


def record_input(artifact: Artifact, folders: Sequence[Path]) -> RecordInput:
    """What `artifact` takes of the images in `folders`, each of which holds a table if it takes more than an image.

    Raises UsageError if the artifact takes no images, or an input that is not of one row an image, and DataError for a table
    that is missing, cannot be read, or lacks the columns of an input.
    """
    images = tuple(image_inputs(artifact))
    specs = artifact.manifest.inputs
    if len(specs) == 1:
        return RecordInput(images=images)
    named = {image.spec.name for image in images}
    values = tuple(spec for spec in specs if spec.name not in named)
    if len({spec.shape[:1] for spec in specs}) > 1 or not all(spec.shape for spec in specs):
        raise UsageError(
            f"{artifact.location} takes {', '.join(map(str, specs))}: a table has one row an image, and not all begin with the batch"
        )
    unfit = [spec for spec in values if spec.dtype == "bfloat16"]
    if unfit:
        raise UsageError(f"{artifact.location} takes {unfit[0]}: numpy has no bfloat16")
    tables = []
    for folder in dict.fromkeys(folders):
        path = find_table(folder)
        if path is None:
            names = ", ".join(repr(spec.name) for spec in specs if spec.name != images[0].spec.name)
            raise DataError(
                f"{artifact.location} takes {names} with every image, and {folder} has no table of it: {' or '.join(TABLES)}, with"
                f" a column {FILE_NAME} and one for each"
            )
        table = read_table(path)
        for image in images[1:]:
            if image.spec.name not in table.columns:
                raise DataError(f"{path} has no column {image.spec.name!r}, the image files of that input")
        for spec in values:
            _check_columns(table, spec, [spec.name for spec in specs])
        tables.append(table)
    return RecordInput(images=images, tables=tuple(tables), values=values)


def _elements(spec: TensorSpec) -> list[str]:
    """The columns of an input that has one for each element; none where the number of elements is not fixed."""
    sizes = [dim for dim in spec.shape[1:] if isinstance(dim, int)]
    count = math.prod(sizes) if len(sizes) == len(spec.shape) - 1 else 0
    return [f"{spec.name}_{index}" for index in range(count)]


def _check_columns(table: Table, spec: TensorSpec, inputs: Sequence[str]) -> None:
    """Raise DataError unless the table has the column of an input, or one for each of its elements and no more of them."""
    if spec.name in table.columns:
        return
    wanted = _elements(spec)
    prefix = f"{spec.name}_"
    found = [name for name in table.columns if name.startswith(prefix) and name[len(prefix) :].isdecimal() and name not in inputs]
    if found and sorted(found) == sorted(wanted):
        return
    each = f", and none for each element, {wanted[0]} to {wanted[-1]}" if wanted else ""
    if found:
        raise DataError(
            f"{table.path} has {len(found)} columns {found[0]} to {found[-1]}; expected {spec}{each.replace(', and none', ': one')}"
        )
    raise DataError(f"{table.path} has no column {spec.name!r} for {spec}{each}; it has {', '.join(table.columns)}")


def _named_image(table: Table, row: Row, image: ImageInput) -> np.ndarray:
    """The array of a further image input, whose file a row names."""
    where = f"{table.path}: the row of {printable(row[FILE_NAME])}"
    name = row[image.spec.name]
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} names no image in {image.spec.name!r}")
    try:
        return image.load(table.path.parent / name)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _values(table: Table, row: Row, spec: TensorSpec) -> np.ndarray:
    """The array of an input, without the batch dimension, of a row's cells."""
    where = f"{table.path}: the row of {printable(row[FILE_NAME])}"
    columns = [spec.name] if spec.name in table.columns else _elements(spec)
    try:
        numbers = [_number(row[name], name) for name in columns]
        if columns == [spec.name]:
            array = _as_dtype(_array(numbers[0], spec.name), spec)
        else:
            for name, number in zip(columns, numbers, strict=True):
                if not np.isscalar(number):
                    raise ValueError(f"{number!r:.80} in {name!r} is not one number")
            array = _as_dtype(np.asarray(numbers), spec)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    wanted = spec.shape[1:]
    fixed = [dim for dim in wanted if isinstance(dim, int)]
    if array.ndim < 2 and len(fixed) == len(wanted) and array.size == math.prod(fixed):
        return array.reshape(fixed)
    if array.ndim != len(wanted) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(wanted, array.shape, strict=True)
    ):
        shape = format_shape(array.shape) if array.shape else "one number"
        raise DataError(f"{where} has {shape} for {spec.name!r}; expected {format_shape(wanted) if wanted else 'one number'}")
    return array


def _number(cell: Any, column: str) -> Any:
    """The number in a cell, or the numbers in nested lists; text is read as a number or as a JSON list."""
    if isinstance(cell, str):
        text = cell.strip()
        try:
            if text.startswith("["):
                return json.loads(text)
            return _WORDS[text.lower()] if text.lower() in _WORDS else _parsed(text)
        except ValueError:
            raise ValueError(f"{cell!r} in {column!r} is no number, and no list such as [1, 2]") from None
    return cell


def _parsed(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _array(number: Any, column: str) -> np.ndarray:
    """A number or nested lists of them as an array. Raises ValueError for lists of several lengths."""
    try:
        return np.asarray(number)
    except ValueError:
        raise ValueError(f"the lists in {column!r} are not all of one length: {number!r:.80}") from None


def _as_dtype(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """`array` in the dtype of an input. Raises ValueError for what is no number, missing, not finite, or cannot be held."""
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise ValueError(f"a number of {spec.name!r} is missing, none or not finite: {array.tolist()!r:.80}")
    with np.errstate(all="ignore"):
        made = array.astype(spec.dtype)
    exact = np.isfinite(made) if made.dtype.kind == "f" else made == array
    if not exact.all():
        raise ValueError(f"{array[~exact].flat[0]} of {spec.name!r} is no {spec.dtype}")
    return made
