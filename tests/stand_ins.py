"""Small stand-ins for the weights and pictures that the pages name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deploy.models.registry import ARCHITECTURES


def digits(folder: Path) -> None:
    """Two digits that nobody confuses."""
    rng = np.random.default_rng(0)
    for part in ("train", "calib", "eval"):
        for label in range(2):
            (folder / "digits" / part / str(label)).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 60, (28, 28), dtype=np.uint8)
                pixels[4:24, 4:24] += 190 * label
                Image.fromarray(pixels).save(folder / "digits" / part / str(label) / f"{index}.png")


def saved(arch: str, **args: Any) -> Callable[[Path], None]:
    """Writes NAME.pth with weights of an architecture, which torch gave."""

    def write(folder: Path) -> None:
        torch.manual_seed(0)
        name = f"{arch}-imagenet.pth" if not args else f"{arch}.pth"
        torch.save(ARCHITECTURES[arch].create(**args).state_dict(), folder / name)

    return write


def photographs(folder: Path) -> None:
    for index, label in enumerate(("cat", "dog")):
        for part in ("train", "val"):
            (folder / "photographs" / part / label).mkdir(parents=True)
            pixels = np.full((60, 80, 3), 200 * index, np.uint8)
            Image.fromarray(pixels).save(folder / "photographs" / part / label / "1.png")


def weights_of_the_page(folder: Path) -> None:
    names: dict[str, Any] = {}
    exec((folder / "my_models/net.py").read_text(), names)
    torch.save(names["Net"](width=64, num_classes=2).state_dict(), folder / "best.pth")


STAND_INS: dict[str, Callable[[Path], Any]] = {
    "resnet34.pth": saved("resnet34", num_classes=2),
    "resnet34-imagenet.pth": saved("resnet34"),
    "mobilenet_v1.pth": saved("mobilenet_v1", num_classes=10, width=0.25),
    "mobilenet_v1-imagenet.pth": saved("mobilenet_v1"),
    "digits": digits,
    "best.pth": weights_of_the_page,
    "classes.txt": lambda folder: (folder / "classes.txt").write_text("cat\ndog\n"),
    "cat.jpg": lambda folder: Image.new("RGB", (50, 40)).save(folder / "cat.jpg"),
    "photographs": photographs,
    "old.json": lambda folder: shutil.copy(folder / "new.json", folder / "old.json"),
}
