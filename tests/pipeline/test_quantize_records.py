"""A net of an image and a vector, from its checkpoint to INT8 on a table beside the images, and on `.npz` files."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.body = torch.nn.Conv2d(3, 8, 3, stride=2)
        self.head = torch.nn.Linear(8 + 2, num_classes)
    def forward(self, image, vector):
        return self.head(torch.cat([torch.relu(self.body(image)).mean((2, 3)), vector], 1))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A net that knows, images whose class is in their vectors, a table of these, and the same as `.npz` files."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    rng = np.random.default_rng(0)
    rows = []
    for label in range(3):
        Path(f"photos/c{label}").mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            vector = np.float32([np.cos(label * 2.1), np.sin(label * 2.1)]) + np.float32(0.1 * rng.standard_normal(2))
            Image.fromarray(pixels).save(f"photos/c{label}/{index}.png")
            rows.append([f"c{label}/{index}.png", *map(str, vector)])
            Path(f"feeds/c{label}").mkdir(parents=True, exist_ok=True)
            image = (pixels.transpose(2, 0, 1).astype(np.float32) / 255)[None]
            np.savez(f"feeds/c{label}/{index}.npz", image=image, vector=vector[None])
    with open("photos/metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["file_name", "vector_0", "vector_1"], *rows])
    names: dict[str, Any] = {}
    exec(NET, names)
    torch.manual_seed(0)
    net = names["Net"]()
    with torch.no_grad():
        angles = torch.arange(3) * 2.1
        net.head.weight[:, :8] *= 0.1
        net.head.weight[:, 8:] = 5 * torch.stack([angles.cos(), angles.sin()], 1)
    torch.save({"state_dict": net.state_dict()}, "trained.pth")
    return tmp_path


def test_a_net_of_an_image_and_a_vector_goes_from_its_checkpoint_to_int8(project: Path, run: Callable[..., Any]) -> None:
    options = ("--weights", "trained.pth", "--input", "image=1x3x12x12", "--input", "vector=1x2", "--preprocess", "none")
    made = run(
        "export", "--model", "net.py:Net", *options, "--data", "photos", "--eval", "photos", "--expect-top1", "100", "-o", "net"
    )
    assert made.status == 0, made.err
    assert "8 images" in made.out
    for data in ("photos", "feeds"):
        made = run("quantize", "net", "--calib", data, "--eval", data, "-o", f"int8-{data}")
        assert made.status == 0, made.err
        assert "top-1 100.00 %" in made.out
        measured = run("eval", f"int8-{data}", data)
        assert measured.status == 0, measured.err
        assert "top-1 100.00 %" in measured.out
    predicted = run("predict", "int8-photos", "photos", "photos/c1/0.png", "--top", "1")
    assert predicted.status == 0, predicted.err
    assert [line.partition(": ")[2][0] for line in predicted.out.splitlines()] == [*("0" * 8), *("1" * 8), *("2" * 8), "1"]


def test_the_table_is_part_of_what_an_artifact_depends_on(project: Path, run: Callable[..., Any]) -> None:
    options = ("--weights", "trained.pth", "--input", "image=1x3x12x12", "--input", "vector=1x2", "--preprocess", "none")
    assert run("export", "--model", "net.py:Net", *options, "-o", "net").status == 0
    quantize = ("quantize", "net", "--calib", "photos", "--eval", "photos", "-o", "int8")
    assert run(*quantize).status == 0
    assert "is up to date" in run(*quantize).err
    table = Path("photos/metadata.csv")
    table.write_text(table.read_text().replace("c0/0.png,", "c0/0.png,-"))
    assert "is up to date" not in run(*quantize).err
    os.remove("photos/metadata.csv")
    refused = run(*quantize)
    assert refused.status == 1
    assert "photos has no table of it: metadata.csv or metadata.parquet" in refused.err


def test_an_unreadable_image_whose_name_is_not_utf8_is_left_out_of_the_calibration(
    project: Path, run: Callable[..., Any]
) -> None:
    options = ("--weights", "trained.pth", "--input", "image=1x3x12x12", "--input", "vector=1x2", "--preprocess", "none")
    assert run("export", "--model", "net.py:Net", *options, "-o", "net").status == 0
    with open(b"photos/c0/caf\xe9.png", "wb") as file:
        file.write(b"no image")
    with open("photos/metadata.csv", "ab") as file:
        file.write(b"c0/caf\xe9.png,1,2\r\n")
    made = run("quantize", "net", "--calib", "photos", "-o", "int8")
    assert made.status == 0, made.err
    assert r"photos/c0/caf\xe9.png" in made.err
    shown = run("inspect", "int8", "--json").out.encode("utf-8").decode()
    assert r"photos/c0/caf\\xe9.png" in shown
