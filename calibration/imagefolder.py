"""Labelled images in folders, one folder for each class as in torchvision's ImageFolder, and batches of them."""

import os
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
"""The suffixes of image files, in lower case."""

Sample = tuple[Path, int]
"""An image file, and the index of its class in `ImageFolder.classes`."""


class ImageFolderError(ValueError):
    """A folder that is no ImageFolder, or images that do not fit into one batch."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The images under `root`, which has one folder for each class.

    classes: the names of the class folders, sorted.
    samples: the images, sorted by class and then by path.
    ignored: the number of files, hidden ones aside, that have no image suffix or are in no class folder.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: int

    def sample(self, count: int, seed: int = 0) -> tuple[Sample, ...]:
        """`count` images, drawn at random and evenly over the classes; all images, shuffled, if there are not more.

        The classes take turns, so that consecutive images are mixed as well as possible, and a smaller sample is the
        beginning of a larger one. Raises ImageFolderError if `count` is below 1.
        """
        if count < 1:
            raise ImageFolderError(f"a sample of {count} images was asked for; expected 1 or more")
        rng = random.Random(seed)  # noqa: S311  (chosen to repeat, not to be secret)
        heaps: list[list[Sample]] = [[] for _ in self.classes]
        for sample in self.samples:
            heaps[sample[1]].append(sample)
        rng.shuffle(heaps)
        for heap in heaps:
            rng.shuffle(heap)
        turns = max(len(heap) for heap in heaps)
        drawn = [heap[turn] for turn in range(turns) for heap in heaps if turn < len(heap)]
        return tuple(drawn[:count])


def scan(root: Path, suffixes: frozenset[str] = SUFFIXES) -> ImageFolder:
    """The images under `root`, whose folders are the classes. Images, files of these suffixes, may be at any depth in them.

    Hidden files and folders are skipped, and links to folders are followed. Raises ImageFolderError if there is no such
    folder, or no class folder in it, or a class folder without images.
    """
    if not root.is_dir():
        raise ImageFolderError(f"{root} is not a folder" if root.exists() else f"no folder at {root}")
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ImageFolderError(f"{root} cannot be read: {error.strerror}") from error
    what = "images" if suffixes is SUFFIXES else f"{' and '.join(sorted(suffixes))} files"
    example = "image.png" if suffixes is SUFFIXES else f"1{min(suffixes)}"
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if not entry.is_dir()]
    if not folders:
        layout = f"{what} must lie in one folder a class, as {root / 'CLASS' / example}"
        if any(path.suffix.lower() in suffixes for path in loose):
            raise ImageFolderError(f"{root} holds {what}, but no class folders: {layout}")
        raise ImageFolderError(f"{root} holds {'no class folders' if loose else 'nothing'}: {layout}")
    samples: list[Sample] = []
    empty: list[str] = []
    ignored = len(loose)
    for label, folder in enumerate(folders):
        files = walk(folder)
        images = [path for path in files if path.suffix.lower() in suffixes]
        ignored += len(files) - len(images)
        samples += [(path, label) for path in images]
        if not images:
            empty.append(folder.name)
    if empty:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise ImageFolderError(
            f"{root} has class folders without {what}: {', '.join(empty[:10])}{more}; add {what} or remove the folders"
        )
    return ImageFolder(root=root, classes=tuple(folder.name for folder in folders), samples=tuple(samples), ignored=ignored)


def is_image(path: Path) -> bool:
    """Whether the suffix of the file is that of an image."""
    return path.suffix.lower() in SUFFIXES


def walk(folder: Path) -> list[Path]:
    """All files under `folder` that are not hidden, sorted. A folder with several links to it is read once.

    Raises ImageFolderError for a folder that cannot be read.
    """
    files: list[Path] = []
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        folders[:] = [] if real in entered else sorted(name for name in folders if not name.startswith("."))
        if real not in entered:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        entered.add(real)
    return sorted(files)


def _refuse(error: OSError) -> None:
    raise ImageFolderError(f"{error.filename} cannot be read: {error.strerror}") from error


Record = Mapping[str, np.ndarray]
"""What a model takes of one file where it has several inputs: an array for each, by name."""


@overload
def batches(
    samples: Sequence[Sample],
    load: Callable[[Path], np.ndarray],
    batch_size: int,
    *,
    workers: int | None = None,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


@overload
def batches(
    samples: Sequence[Sample],
    load: Callable[[Path], Record],
    batch_size: int,
    *,
    workers: int | None = None,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]: ...


def batches(
    samples: Sequence[Sample],
    load: Callable[[Path], np.ndarray | Record],
    batch_size: int,
    *,
    workers: int | None = None,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[Any, np.ndarray]]:
    """Images and labels, in order: (N, C, H, W) and (N,) int64; the last batch may be smaller.

    `load` makes a (C, H, W) array of a file, of the same dtype for all, or a dict of arrays; the images of a batch are then a dict too, of the same
    dtypes, each with N in front. `workers` threads (None: one for each CPU core, at most 8, or one alone for small files that take less than 0.5 ms, of which it tries three first) call it up to one
    batch ahead of need, so that memory does not grow with the number of images. An error of `load` is raised with a note
    that names the file. With `skip`, an image whose `load` raises an Exception is left out, the next images fill the batch,
    and `skip` is called with the error, in order and in the thread of the caller; if `skip` raises, the stream ends.
    Raises ImageFolderError for images whose arrays have different shapes.
    """
    if batch_size < 1:
        raise ImageFolderError(f"batch size must be 1 or more, not {batch_size}")
    workers = workers or (1 if _are_small(samples, load) else min(8, len(os.sched_getaffinity(0))))
    return _batches(samples, load, batch_size, workers, skip)


_MOST_AT_ONCE = 8
"""Images that a thread loads at a time: of small ones, handing over each by itself takes as long as loading it."""
_SMALL_BYTES, _LOOKED_AT = 4096, 16
_QUICK_S, _TRIED = 5e-4, 3
_IMAGE = ""
"""The name of an array that `load` gives none."""


def _batches(
    samples: Sequence[Sample],
    load: Callable[[Path], np.ndarray | Record],
    batch_size: int,
    workers: int,
    skip: Callable[[Path, Exception], None] | None,
) -> Iterator[tuple[Any, np.ndarray]]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    size = min(max(batch_size // (2 * workers), 1), _MOST_AT_ONCE)
    try:
        waiting = (pool.submit(_loaded, load, samples[at : at + size]) for at in range(0, len(samples), size))
        ahead = deque(islice(waiting, max(batch_size, 2 * workers) // size))
        rows: dict[str, np.ndarray] = {}
        taken: list[Sample] = []
        for index, (path, label) in enumerate(samples):
            if index % size == 0:
                at_once = iter(ahead.popleft().result())
                ahead.extend(islice(waiting, 1))
            loaded: np.ndarray | Record | None = None
            found = next(at_once)
            if isinstance(found, Exception):
                found.add_note(f"while loading {path}")
                if skip is None:
                    raise found
                skip(path, found)
            else:
                loaded = found
            if loaded is None:
                continue
            record = loaded if isinstance(loaded, Mapping) else {_IMAGE: loaded}
            if not taken:
                most = min(batch_size, len(samples) - index)
                rows = {name: np.empty((most, *array.shape), dtype=array.dtype) for name, array in record.items()}
            _put(record, rows, path, taken)
            taken.append((path, label))
            if len(taken) == batch_size:
                yield rows.get(_IMAGE, rows), _labels(taken)
                taken = []
        if taken:
            rows = {name: array[: len(taken)] for name, array in rows.items()}
            yield rows.get(_IMAGE, rows), _labels(taken)
    finally:
        pool.shutdown(cancel_futures=True)


def _are_small(samples: Sequence[Sample], load: Callable[[Path], object]) -> bool:
    """Whether several threads would mostly wait for Python's lock: 5,000 images of 28x28 take 1.2 s in one thread and 2.0 s in two.

    Of small files, a few are loaded for that.
    """
    some = [path for path, _ in samples[:: max(1, len(samples) // _LOOKED_AT)]]
    try:
        if not some or statistics.median(path.stat().st_size for path in some) > _SMALL_BYTES:
            return False
        seconds = []
        for path in some[:_TRIED]:
            start = time.perf_counter()
            load(path)
            seconds.append(time.perf_counter() - start)
    except Exception:  # it is said where it is loaded
        return False
    return min(seconds) <= _QUICK_S


def _loaded(load: Callable[[Path], np.ndarray | Record], samples: Sequence[Sample]) -> list[np.ndarray | Record | Exception]:
    """What `load` makes of each file, or its error."""
    found: list[np.ndarray | Record | Exception] = []
    for path, _ in samples:
        try:
            found.append(load(path))
        except Exception as error:
            found.append(error)
    try:
        return found
    finally:
        del found  # the trace of an error holds this frame, and so all that was loaded with it


def _put(record: Record, rows: dict[str, np.ndarray], path: Path, taken: Sequence[Sample]) -> None:
    """Write a record into the next of the `rows`. Raises ImageFolderError for an array of another shape than those before."""
    for name, array in record.items():
        shape = rows[name].shape[1:]
        if array.shape != shape:
            of = f" for {name!r}" if name else ""
            raise ImageFolderError(
                f"{path} gives an array of shape {array.shape}{of} and {taken[0][0]} one of {shape}: images of"
                " one batch must be of one size; resize and crop them, or use batches of 1"
            )
        rows[name][len(taken)] = array


def _labels(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([label for _, label in samples], dtype=np.int64)
