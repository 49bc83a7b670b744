"""`export --eval --expect-top1`: the accuracy of an export beside what training reported."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import AccuracyError, DataError, UsageError

NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.levels = torch.nn.Parameter(torch.zeros(4))
    def forward(self, image):
        return -(image.mean((1, 2, 3))[:, None] - self.levels[None]).abs()
"""


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options that export a net which is right on all 16 images of `photos`, whose centre alone has the grey of the class."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.save({"levels": torch.arange(4.0) / 3}, "w.pth")
    for label in range(4):
        for index in range(4):
            pixels = np.full((16, 16, 3), 255 - 85 * label, np.uint8)
            pixels[4:12, 4:12] = 85 * label
            Path(f"photos/c{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(f"photos/c{label}/{index}.png")
    Path("right.json").write_text('{"crop": 8}')
    Path("wrong.json").write_text('{"resize": 8, "crop": 8}')
    return {"model": "net.py:Net", "weights": "w.pth", "inputs": ["image=1x3x8x8"], "eval_folder": "photos"}


def test_the_accuracy_stands_in_the_manifest_with_what_training_reported(trained: dict[str, Any]) -> None:
    made = deploy.export("out", **trained, preprocess="right.json", expect_top1=99.5)
    accuracy = Artifact.open(made.path).manifest.accuracy
    assert accuracy is not None
    assert (accuracy.top1, accuracy.images, accuracy.expected_top1, accuracy.parent_top1) == (100, 16, 99.5, None)
    assert (accuracy.top1_low, accuracy.top1_high) == (pytest.approx(80.64, abs=0.01), 100)


@pytest.mark.parametrize("bare", [False, True], ids=["module", "bare ONNX"])
def test_a_wrong_resize_is_an_error_and_nothing_is_written(trained: dict[str, Any], bare: bool) -> None:
    if bare:
        graph = deploy.export("graph", **{**trained, "eval_folder": None}).path / "model.onnx"
        trained = {"onnx": graph, "eval_folder": "photos"}
    first = deploy.export("out", **trained, preprocess="right.json", expect_top1=100)
    with pytest.raises(
        AccuracyError, match=r"has top-1 .* of 16 images of photos .*training reported 100 %.*\n.*resize 8, crop 8"
    ):
        deploy.export("out", **trained, preprocess="wrong.json", expect_top1=100)
    assert Artifact.open("out").manifest == first.manifest
    with pytest.raises(AccuracyError):
        deploy.export("new", **trained, preprocess="wrong.json", expect_top1=100)
    assert not Path("new").exists()


def test_an_export_is_up_to_date_until_the_images_or_the_expectation_change(trained: dict[str, Any]) -> None:
    def made_again(**changes: Any) -> bool:
        before = Path("out/manifest.json").stat().st_ino
        deploy.export("out", **{**trained, "preprocess": "right.json", "expect_top1": 99.0, **changes})
        return Path("out/manifest.json").stat().st_ino != before

    deploy.export("out", **trained, preprocess="right.json", expect_top1=99.0)
    assert not made_again()
    assert made_again(expect_top1=90.0)
    Path("photos/c0/3.png").unlink()
    assert made_again(expect_top1=90.0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eval_folder": "gone"}, DataError, "no folder at gone"),
        ({"preprocess": None}, UsageError, "does not say how images become its input"),
        ({"expect_top1": 0.995}, UsageError, "`expect_top1` is in per cent"),
        ({"eval_folder": None, "expect_top1": 99.5}, UsageError, "`expect_top1` needs `eval_folder`"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_export(
    trained: dict[str, Any], untouched: None, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        deploy.export("out", **{**trained, "preprocess": "right.json", **changes})


def test_the_command_line_shows_the_accuracy(trained: dict[str, Any], run: Callable[..., Any]) -> None:
    options = (
        "--model",
        "net.py:Net",
        "--weights",
        "w.pth",
        "--input",
        "image=1x3x8x8",
        "--eval",
        "photos",
        "--expect-top1",
        "98",
    )
    finished = run("export", *options, "--preprocess", "right.json", "-o", "out")
    assert finished.status == 0, finished.err
    assert (
        "top-1 100.00 %, top-5 100.00 % of 16 images; training reported 98.00 % (95 % interval of top-1 80.64 to 100.00"
        in finished.out
    )
    refused = run("export", *options, "--preprocess", "wrong.json", "-o", "other")
    assert (refused.status, refused.out) == (1, "")
    assert "training reported 98 %" in refused.err
