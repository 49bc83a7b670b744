"""Labelled images in folders: one folder a class, as torchvision's ImageFolder has it, and a stream of batches of them."""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)
"""File names that end so, in any case, are taken for images."""

Sample = tuple[Path, int]
"""An image file, and the index of its class in `ImageFolder.classes`."""


class ImageFolderError(ValueError):
    """A folder that does not hold images in one folder a class, or images that do not make one batch."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """The images under `root`, one folder a class.

    classes: names of the class folders, sorted.
    samples: the images, sorted by class and then by path.
    ignored: how many files that are no images by name, or lie in no class folder, were left out (hidden ones not counted).
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    ignored: int

    def sample(self, count: int, seed: int = 0) -> tuple[Sample, ...]:
        """`count` images drawn at random, evenly over the classes; all of them, shuffled, where there are no more.

        The classes take turns, so that every run of consecutive images is as mixed as it can be, and the draw of fewer
        images is the beginning of the draw of more. Raises ImageFolderError when `count` is not 1 or more.
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


def scan(root: Path) -> ImageFolder:
    """Find the images under `root`: its folders are the classes, and images may lie at any depth in them.

    Hidden files and folders are skipped; links to folders are followed. Raises ImageFolderError, saying what is wrong,
    when there is no such folder, no class folder in it or a class folder without images.
    """
    if not root.is_dir():
        raise ImageFolderError(f"{root} is not a folder" if root.exists() else f"no folder at {root}")
    try:
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise ImageFolderError(f"{root} cannot be read: {error.strerror}") from error
    folders = [entry for entry in entries if entry.is_dir()]
    loose = [entry for entry in entries if not entry.is_dir()]
    if not folders:
        layout = f"images must lie in one folder a class, as {root / 'CLASS' / 'image.png'}"
        if any(is_image(path) for path in loose):
            raise ImageFolderError(f"{root} holds images, but no class folders: {layout}")
        raise ImageFolderError(f"{root} holds {'no class folders' if loose else 'nothing'}: {layout}")
    samples: list[Sample] = []
    empty: list[str] = []
    ignored = len(loose)
    for label, folder in enumerate(folders):
        files = walk(folder)
        images = [path for path in files if is_image(path)]
        ignored += len(files) - len(images)
        samples += [(path, label) for path in images]
        if not images:
            empty.append(folder.name)
    if empty:
        more = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise ImageFolderError(
            f"{root} has class folders without images: {', '.join(empty[:10])}{more}; add images or remove the folders"
        )
    return ImageFolder(root=root, classes=tuple(folder.name for folder in folders), samples=tuple(samples), ignored=ignored)


def is_image(path: Path) -> bool:
    """Whether the name of the file is that of an image."""
    return path.suffix.lower() in SUFFIXES


def walk(folder: Path) -> list[Path]:
    """All files under `folder` but the hidden ones, sorted. Every folder is entered once, however often it is linked to.

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


def batches(
    samples: Sequence[Sample],
    load: Callable[[Path], np.ndarray],
    batch_size: int,
    *,
    workers: int | None = None,
    skip: Callable[[Path, Exception], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels, in order: (N, C, H, W) float32 and (N,) int64; the last batch may be smaller.

    `load` makes one (C, H, W) array of a file; `workers` threads (None: one a CPU core, at most 8) call it ahead of
    need, by one batch at most, so that memory does not grow with the number of images. What `load` raises comes
    through, with a note that names the file; with `skip`, an image for which it raises an Exception is left out, the
    batch is filled from those that follow, and `skip` is told, in order and in the thread of the caller; what `skip`
    raises ends the stream. Raises ImageFolderError for images whose arrays differ in shape.
    """
    if batch_size < 1:
        raise ImageFolderError(f"batch size must be 1 or more, not {batch_size}")
    workers = workers or min(8, len(os.sched_getaffinity(0)))
    return _batches(samples, load, batch_size, workers, skip)


def _batches(
    samples: Sequence[Sample],
    load: Callable[[Path], np.ndarray],
    batch_size: int,
    workers: int,
    skip: Callable[[Path, Exception], None] | None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    try:
        waiting = iter(samples)
        ahead = deque(pool.submit(load, path) for path, _ in islice(waiting, max(batch_size, 2 * workers)))
        images: np.ndarray | None = None
        taken: list[Sample] = []
        for index, (path, label) in enumerate(samples):
            image: np.ndarray | None = None
            try:
                image = ahead.popleft().result()
            except Exception as error:
                error.add_note(f"while loading {path}")
                if skip is None:
                    raise
                skip(path, error)
            ahead.extend(pool.submit(load, path) for path, _ in islice(waiting, 1))
            if image is None:
                continue
            if images is None:
                images = np.empty((min(batch_size, len(samples) - index), *image.shape), dtype=np.float32)
            if image.shape != images.shape[1:]:
                raise ImageFolderError(
                    f"{path} gives an array of shape {image.shape} and {taken[0][0]} one of {images.shape[1:]}: images of"
                    " one batch must be of one size; resize and crop them, or use batches of 1"
                )
            images[len(taken)] = image
            taken.append((path, label))
            if len(taken) == batch_size:
                yield images, _labels(taken)
                images, taken = None, []
        if images is not None:
            yield images[: len(taken)], _labels(taken)
    finally:
        pool.shutdown(cancel_futures=True)


def _labels(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([label for _, label in samples], dtype=np.int64)
