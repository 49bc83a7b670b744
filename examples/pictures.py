"""Pictures of your own for examples/finetune.py: found, split, checked, and turned into what a net takes."""

import random
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from deploy.artifact.image_ops import eight_bit, read_image, upright
from deploy.artifact.preprocess import Preprocess
from deploy.calibration.imagefolder import ImageFolder
from deploy.data.image_folder import read_folder
from deploy.errors import DataError

AUGMENTATIONS = ("crop", "flip", "colour", "erase")
HELD = 0.2
"""Share of every class that is held out of a folder that is not divided."""


def find(pictures: Path, links: Path, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """The pictures to train on, from train/, and those to judge by, from val/ or eval/.

    Of a folder without train/, a fifth of every class is held out, by links in the folder `links`. Raises DataError.
    """
    if not (pictures / "train").is_dir():
        split(read_folder(pictures), links, seed)
        pictures = links
    held = pictures / ("eval" if (pictures / "eval").is_dir() and not (pictures / "val").is_dir() else "val")
    train, judged = read_folder(pictures / "train"), read_folder(held)
    if other := set(train.classes) ^ set(judged.classes):
        raise DataError(f"{train.root} and {held} must have the same classes, and {min(other)!r} is in one of them alone")
    if len(train.classes) < 2:
        raise DataError(f"{train.root} has one class, {train.classes[0]!r}: there is nothing to tell it from")
    return train, judged


def split(folder: ImageFolder, links: Path, seed: int) -> None:
    """Link a fifth of every class, at least one image, in LINKS/val, and the others in LINKS/train. Raises DataError."""
    shutil.rmtree(links, ignore_errors=True)
    for label, name in enumerate(folder.classes):
        files = [path for path, own in folder.samples if own == label]
        if len(files) < 2:
            raise DataError(f"{folder.root / name} has one image: two are needed, one of them to judge by")
        random.Random(seed).shuffle(files)  # noqa: S311  (chosen to repeat)
        held = min(max(1, round(HELD * len(files))), len(files) - 1)
        for index, path in enumerate(files):
            link = links / ("val" if index < held else "train") / path.relative_to(folder.root)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


def check(paths: list[Path], preprocess: Preprocess) -> None:
    """Raise a DataError that names the files that cannot be read: now, and not in the middle of the third epoch."""

    def trouble(path: Path) -> str:
        try:
            preprocess.open(path)
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        found = [each for each in pool.map(trouble, paths) if each]
    if found:
        raise DataError("\n".join([*found[:10], f"{len(found)} of {len(paths):,} images: remove them, or put them right"]))


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures as (C, H, W) float32, and the indices of their classes.

    To judge by, a picture becomes exactly what the artifact will make of it. To train on, it is changed at random before:

    crop: a part of at least `area` of the picture (0 to 1), scaled to the size; flip: left to right, in half of all cases;
    colour: brightness, contrast and saturation by up to a fifth; erase: a rectangle is blanked, in a quarter of all cases.
    """

    def __init__(
        self, folder: ImageFolder, preprocess: Preprocess, augment: Collection[str] | None = None, area: float = 1
    ) -> None:
        self.samples, self.preprocess, self.judging = folder.samples, preprocess, augment is None
        augment = augment or ()
        steps: list[Any] = [v2.Identity()]
        if "crop" in augment:
            mode = v2.InterpolationMode(preprocess.interpolation)
            steps.append(v2.RandomResizedCrop(preprocess.size, (area, 1), interpolation=mode))
            # That makes the size: of the artifact's preprocessing, the arithmetic on pixels remains.
            preprocess = replace(preprocess, resize=None, resize_mode=None, crop=None, position="center", fill=0)
        if "flip" in augment:
            steps.append(v2.RandomHorizontalFlip())
        if "colour" in augment:
            steps.append(v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2))
        self.change = v2.Compose(steps)
        self.finish = replace(preprocess, exif_orientation=False)  # turned upright before it is changed
        self.erase = v2.RandomErasing(p=0.25) if "erase" in augment else v2.Identity()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = read_image(path)
        if self.judging:
            return torch.from_numpy(self.preprocess(image)), label
        image = upright(image) if self.preprocess.exif_orientation else image
        image = self.change(eight_bit(image, "L" if self.preprocess.channels == 1 else "RGB"))
        return self.erase(torch.from_numpy(self.finish(image))), label
