"""`deploy eval`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from deploy.artifact.artifact import Artifact
from tests.cli.helpers import refused

Run = Callable[..., Any]


def test_a_folder_that_is_no_imagefolder(run: Run, lenet5: Artifact, tmp_path: Path) -> None:
    refused(run("eval", lenet5.path, tmp_path / "missing"), 1, "missing")
    (tmp_path / "empty").mkdir()
    refused(run("eval", lenet5.path, tmp_path / "empty"), 1, "empty")
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (28, 28)).save(flat / "a.png")
    refused(run("eval", lenet5.path, flat), 1, "one folder")


def test_a_corrupt_image_is_named(run: Run, shared_lenet5: Artifact, images: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(map(str, range(10))))
    made = run("export", "--arch", "lenet5", "--classes", classes, "-o", tmp_path / "digits")
    assert made.status == 0, made.err
    assert run("eval", tmp_path / "digits", images).status == 0
    (images / "1" / "0.png").write_bytes((images / "1" / "0.png").read_bytes()[:40])
    refused(run("eval", tmp_path / "digits", images), 1, str(images / "1" / "0.png"))
