"""A checkpoint and folders of images for the command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deploy.models.registry import ARCHITECTURES


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a checkpoint, class names and an ImageFolder of digits."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(ARCHITECTURES["lenet5"].create().state_dict(), "w.pth")
    Path("classes.txt").write_text("\n".join(f"digit {number}" for number in range(10)))
    for number in (3, 7):
        (tmp_path / "images" / f"digit {number}").mkdir(parents=True)
        for index in range(2):
            pixels = np.random.default_rng(index).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"digit {number}" / f"{index}.png")
    return tmp_path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The state_dict of an `mlp`."""
    path = tmp_path / "mlp.pth"
    torch.save(ARCHITECTURES["mlp"].create().state_dict(), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An ImageFolder of two classes with two images each."""
    root = tmp_path / "images"
    for index, label in enumerate(("0", "1")):
        (root / label).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.full((28, 28), 40 * number + 90 * index, np.uint8)).save(root / label / f"{number}.png")
    return root
