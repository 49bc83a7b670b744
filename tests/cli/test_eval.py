"""`deploy eval`."""

import json
import os
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


def test_a_corrupt_image_is_named_and_the_accuracy_is_that_of_the_others(
    run: Run, shared_lenet5: Artifact, images: Path, tmp_path: Path
) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(map(str, range(10))))
    made = run("export", "--arch", "lenet5", "--classes", classes, "-o", tmp_path / "digits")
    assert made.status == 0, made.err
    assert run("eval", tmp_path / "digits", images).status == 0
    (images / "1" / "0.png").write_bytes((images / "1" / "0.png").read_bytes()[:40])
    finished = run("eval", tmp_path / "digits", images)
    assert finished.status == 1
    assert "3 images" in finished.out
    assert f"error: {images / '1' / '0.png'} is not an image" in finished.err
    strange = os.fsencode(images / "0") + b"/\xe9.png"
    Path(os.fsdecode(strange)).write_bytes(b"no image")
    finished = run("eval", tmp_path / "digits", images, "--json")
    assert finished.status == 1
    document = json.loads(finished.out.encode("utf-8"))
    assert document["images"] == 3
    assert [each["path"] for each in document["failed"]] == [str(images / "0") + r"/\xe9.png", str(images / "1" / "0.png")]
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    refused(run("eval", tmp_path / "digits", images), 1, "none of 5 files", str(images / "0" / "0.png"))
