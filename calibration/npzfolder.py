"""Feeds for models whose input is not one image: a folder of .npz files that have one array for every model input."""

from pathlib import Path

import numpy as np

from .imagefolder import ImageFolderError, walk

SUFFIX = ".npz"


class NpzFolderError(ValueError):
    """A folder without .npz files, or a file that does not hold named arrays."""


def scan(root: Path) -> tuple[Path, ...]:
    """The .npz files under `root`, at any depth, sorted. Hidden files and folders are skipped, links to folders followed.

    Raises NpzFolderError if there is no such folder or no .npz file in it.
    """
    if not root.is_dir():
        raise NpzFolderError(f"{root} is not a folder" if root.exists() else f"no folder at {root}")
    try:
        files = walk(root)
    except ImageFolderError as error:
        raise NpzFolderError(str(error)) from error
    archives = tuple(path for path in files if path.suffix.lower() == SUFFIX)
    if not archives:
        other = f"{len(files)} files, but none that ends in {SUFFIX}" if files else "nothing"
        raise NpzFolderError(f"{root} holds {other}; expected one {SUFFIX} file a feed, with one array per model input")
    return archives


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one feed by name, as `numpy.savez` wrote them. Nothing is unpickled.

    Raises NpzFolderError for a file that is missing, damaged, empty or not of named arrays.
    """
    advice = "write it with numpy.savez(path, NAME=array, ...)"
    try:
        with path.open("rb") as file:  # numpy leaves a damaged file open
            archive = np.load(file, allow_pickle=False)
            # A bare .npy has an array without a name.
            feed = {name: archive[name] for name in archive.files} if isinstance(archive, np.lib.npyio.NpzFile) else {}
    except Exception as error:  # zlib, zipfile and numpy raise many kinds of errors for a damaged archive
        raise NpzFolderError(f"{path} cannot be read as arrays: {error or type(error).__name__}; {advice}") from error
    strange = [name for name, array in feed.items() if not isinstance(array, np.ndarray)]
    if strange or not feed:
        wrong = f"entries that are no arrays: {', '.join(strange)}" if strange else "no named arrays"
        raise NpzFolderError(f"{path} holds {wrong}; {advice}")
    return feed
