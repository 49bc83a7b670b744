"""Images with masks or boxes as batches, and the choice of what a folder holds."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.data.coco import Boxes, CocoFile, class_of_category, find_coco, read_coco
from deploy.data.image_folder import IMAGES, MASKS, read_folder, read_images
from deploy.data.masks import check_masks, holds_masks, read_mask, read_pairs
from deploy.data.npz_folder import holds_npz
from deploy.data.records import record_input
from deploy.errors import DataError
from deploy.evaluation.labelled import Classed, Images, Labelled, Npz, out_of_order
from deploy.evaluation.metric import Kind
from deploy.words import count_of, did_you_mean, printable

logger = logging.getLogger(__name__)

Wanted = Kind | Literal["anything"] | None
"""What targets a metric takes; None: no targets at all."""

_TAKES = {"classes": "top1 and top5", "masks": "miou", "boxes": "map"}
"""The metrics of each layout."""

_LAYOUTS = {
    "classes": "an ImageFolder, with one folder of images a class",
    "masks": f"a folder with {IMAGES}/ and {MASKS}/",
    "boxes": "a COCO JSON",
    "arrays": ".npz files",
}


class Masked(Images):
    """Images with a mask each, which is resized, cropped and padded as its image is."""

    kind = "masks"

    def __init__(self, artifact: Artifact, folder: Path, classes: int | None, ignore: int) -> None:
        self._pairs = read_pairs(folder)
        home = folder / IMAGES
        source = record_input(artifact, [home])
        super().__init__(folder, home, [image for image, _ in self._pairs], source)
        self._preprocess = source.images[0].preprocess
        self._classes, self._ignore = classes, ignore

    def targets_of(self, indices: Sequence[int]) -> np.ndarray:
        masks = [self._preprocess.mask(read_mask(self._pairs[index][1]), self._ignore) for index in indices]
        return np.stack(masks)

    def check(self) -> None:
        self._preprocess.mask(read_mask(self._pairs[0][1]), self._ignore)  # where a function makes the array, no mask can follow
        check_masks(self._pairs, self._classes, self._ignore)

    def needed(self) -> Sequence[Path]:
        return [*super().needed(), *(mask for _, mask in self._pairs)]


class Boxed(Images):
    """The pictures of a COCO JSON, with the boxes in each.

    labels: the indices of the model's classes that the file has categories for; names: of these. preprocess: of the pictures.
    """

    kind = "boxes"

    def __init__(self, artifact: Artifact, file: CocoFile) -> None:
        pictures = file.pictures
        home = pictures[0].path.parent
        source = record_input(artifact, [home])
        super().__init__(file.path, home, [picture.path for picture in pictures], source)
        index = class_of_category(file, artifact.manifest.classes, str(artifact.location))
        self.labels = tuple(index.values())
        self.names = {index[category]: name for category, name in file.categories.items()}
        self._boxes = [
            each.boxes._replace(labels=np.array([index[int(label)] for label in each.boxes.labels], np.int64))
            for each in pictures
        ]
        self.preprocess = source.images[0].preprocess
        self.preprocess.placement(
            pictures[0].width, pictures[0].height
        )  # where a function makes the array, no box finds its way back

    def targets_of(self, indices: Sequence[int]) -> list[Boxes]:
        return [self._boxes[index] for index in indices]

    def needed(self) -> Sequence[Path]:
        return [*super().needed(), self.root]


class Unlabelled(Images):
    """Images of any folder, without targets."""

    kind = None

    def __init__(self, artifact: Artifact, folder: Path) -> None:
        images = read_images(folder)
        super().__init__(folder, images.root, [path for path, _ in images.samples], record_input(artifact, [images.root]))


def labelled(
    artifact: Artifact, place: Path, wanted: Wanted = "classes", *, classes: int | None = None, ignore: int = 255
) -> Labelled:
    """The data at `place`, a folder or a COCO JSON, for `artifact`, with the targets that are `wanted`.

    classes: of the model, as far as it is known: class folders and masks are checked against it. Raises DataError for what cannot
    be used or has other targets, and UsageError for a model that takes no images.
    """
    if not place.exists():
        raise DataError(f"no {'file' if place.suffix.lower() == '.json' else 'folder'} at {printable(place)}")
    held = _held(place)
    if held == "npz":
        if wanted == "boxes":
            raise DataError(f"{place} holds .npz files; boxes are measured on {_LAYOUTS['boxes']}")
        kind = "arrays" if wanted == "anything" else wanted
        return Npz(
            artifact, place, kind, lambda names: class_indices(artifact, place, names, classes), count=classes, ignore=ignore
        )
    if wanted is None:
        return Unlabelled(artifact, place.parent if held == "boxes" and place.is_file() else place)
    if wanted not in ("anything", held):
        needed = _LAYOUTS[str(wanted)]
        if held == "classes" and not any(entry.is_dir() for entry in place.iterdir()):
            raise DataError(f"{place} holds no labels; the metric takes {needed}")
        raise DataError(
            f"{place} holds {_LAYOUTS[held]}; the metric takes {needed} (`metric` {_TAKES[held]} takes what it holds)"
        )
    if held == "masks":
        return Masked(artifact, place, classes, ignore)
    if held == "boxes":
        found = find_coco(place)
        assert found is not None
        return Boxed(artifact, read_coco(found))
    images = read_folder(place)
    indices = class_indices(artifact, place, images.classes, classes)
    return Classed(place, images.samples, images.classes, indices, record_input(artifact, [place]))


def _held(place: Path) -> Literal["classes", "masks", "boxes", "npz"]:
    """What lies at `place`, by its files; `classes` where it is nothing else."""
    if holds_masks(place):
        return "masks"
    if holds_npz(place):
        return "npz"
    if find_coco(place) is not None:
        loose = place.is_file() or (place / IMAGES).is_dir() or not any(entry.is_dir() for entry in place.iterdir())
        return "boxes" if loose else "classes"
    return "classes"


def class_indices(artifact: Artifact, root: Path, folders: Sequence[str], count: int | None) -> list[int]:
    """The index of the model's class for every class folder. Raises DataError for a folder that is no class of the model.

    count: of the model's classes, as far as it is known.
    """
    names = artifact.manifest.classes
    if names is None:
        _warn_of_order(root, tuple(folders))
        if count is not None:
            check_folders(artifact, root, folders, count)
        return list(range(len(folders)))
    unknown = [folder for folder in folders if folder not in names]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise DataError(
            f"{root / unknown[0]}{more} is no class of {artifact.location}, which has {len(names)} of them:"
            f" {', '.join(map(repr, names[:3]))}...{did_you_mean(unknown[0], names)}"
        )
    twice = [folder for folder in folders if names.count(folder) > 1]
    if twice:
        raise DataError(f"{root / twice[0]} may be any of {names.count(twice[0])} classes that {artifact.location} calls so")
    return [names.index(folder) for folder in folders]


@functools.cache
def _warn_of_order(root: Path, classes: tuple[str, ...]) -> None:
    """Say where class folders are called by numbers and their order is another; once, for a gate evaluates twice.

    Nothing but their order makes them classes where the model has no names.
    """
    if ordered := out_of_order(classes):
        index = next(index for index, name in enumerate(classes) if name != ordered[index])
        logger.warning(
            "the class folders of %s are called by numbers, and taken in the order of torchvision's ImageFolder: class %d is %r, not %r;"
            " if the model's classes are the numbers, export it with --classes FILE, which lists them in their order",
            root,
            index,
            classes[index],
            ordered[index],
        )


def check_folders(artifact: Artifact, root: Path, folders: Sequence[str] | None, count: int) -> None:
    """Raise DataError if the model has no class names and the number of folders is not that of its classes."""
    if artifact.manifest.classes is None and folders is not None and len(folders) != count:
        raise DataError(
            f"{root} has {count_of(len(folders), 'class folder')} and {artifact.location}"
            f" {count_of(count, 'class')}, without names to pair them by; export it with --classes FILE"
        )
