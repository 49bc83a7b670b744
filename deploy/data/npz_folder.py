"""Folders of `.npz` files: feeds that need no preprocessing, with labels where accuracy is measured on them.

The files lie directly in the folder, or in one folder a class. A file has one array an input, of one sample or several rows.
Where the files are in no class folders, an array `label` (or `target`) may hold the index of each row's class, its mask, or whatever
else a metric of the user's takes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deploy.artifact.tensors import Feed, TensorSpec
from deploy.calibration import imagefolder, npzfolder
from deploy.calibration.imagefolder import ImageFolderError, Sample
from deploy.calibration.npzfolder import NpzFolderError
from deploy.errors import DataError

LABEL = "label"
LABELS = (LABEL, "target")
"""The names of the array with the indices of the classes, or other targets, of which a file has one."""


@dataclass(frozen=True, kw_only=True)
class NpzFolder:
    """The `.npz` files under `root`, with the index of their class folder; `classes` is None where they are in none."""

    root: Path
    classes: tuple[str, ...] | None
    samples: tuple[Sample, ...]

    def sample(self, count: int) -> tuple[Sample, ...]:
        """The first `count` files; of class folders, files drawn evenly over the classes."""
        if self.classes is None:
            return self.samples[:count]
        folder = imagefolder.ImageFolder(root=self.root, classes=self.classes, samples=self.samples, ignored=0)
        return folder.sample(count)


def holds_npz(folder: Path) -> bool:
    """Whether `folder` has feeds: `.npz` files directly in it, or folders whose first image or `.npz` file is the latter."""
    if not folder.is_dir():
        return False
    if any(path.suffix.lower() == npzfolder.SUFFIX for path in folder.iterdir()):
        return True
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        entered.add(real)
        suffixes = {Path(name).suffix.lower() for name in names if not name.startswith(".")}
        if suffixes & imagefolder.SUFFIXES:
            return False
        if npzfolder.SUFFIX in suffixes:
            return True
    return False


def read_npz_folder(folder: Path) -> NpzFolder:
    """The `.npz` files of a folder that holds feeds. Raises DataError."""
    try:
        if any(path.suffix.lower() == npzfolder.SUFFIX for path in folder.iterdir()):
            return NpzFolder(root=folder, classes=None, samples=tuple((path, 0) for path in npzfolder.scan(folder)))
        found = imagefolder.scan(folder, frozenset((npzfolder.SUFFIX,)))
    except (NpzFolderError, ImageFolderError) as error:
        raise DataError(str(error)) from error
    return NpzFolder(root=folder, classes=found.classes, samples=found.samples)


def read_npz(path: Path, specs: Sequence[TensorSpec]) -> tuple[Feed, np.ndarray | None]:
    """The arrays of a file, and its labels, one a row, None without them. Raises DataError."""
    try:
        arrays = npzfolder.read(path)
    except NpzFolderError as error:
        raise DataError(str(error)) from error
    names = [name for name in LABELS if name in arrays and all(spec.name != name for spec in specs)]
    labels = arrays.pop(names[0]) if names else None
    return arrays, None if labels is None else np.atleast_1d(labels)
