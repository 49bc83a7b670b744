"""`deploy predict`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import refused

Run = Callable[..., Any]


def test_every_image_is_a_line_with_the_likeliest_classes_first(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5", "--classes", "classes.txt").status == 0
    finished = run("predict", "images/digit 3", "images/digit 7/0.png", "--top", "3")
    assert finished.status == 0, finished.err
    lines = finished.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "images/digit 3/0.png",
        "images/digit 3/1.png",
        "images/digit 7/0.png",
    ]
    for line in lines:
        classes = line.partition(": ")[2].split(", ")
        shares = [float(text.rpartition(" ")[2].removesuffix("%")) for text in classes]
        assert len(classes) == 3
        assert all(text.startswith("digit ") for text in classes)
        assert shares == sorted(shares, reverse=True)


def test_an_image_that_is_missing_or_damaged_is_named(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    refused(run("predict", "build/lenet5", "images/none.png"), 1, "images/none.png")
    (folder / "images" / "digit 3" / "1.png").write_bytes(b"no image")
    refused(run("predict", "images/digit 3"), 1, "images/digit 3/1.png")


def test_an_image_whose_name_is_not_utf8_is_shown_like_the_others(run: Run, folder: Path) -> None:
    odd = "images/digit 3/caf\udce9.png"
    try:
        os.rename("images/digit 3/1.png", odd)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    assert run("export", "--arch", "lenet5").status == 0
    command = [sys.executable, "-m", "deploy", "predict", "images", "--top", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as on a terminal
    lines = subprocess.run(command, capture_output=True, check=True, env=env).stdout.decode().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "images/digit 3/0.png",
        "images/digit 3/caf\\udce9.png",
        "images/digit 7/0.png",
        "images/digit 7/1.png",
    ]
    document = subprocess.run([*command, "--json"], capture_output=True, check=True, env=env).stdout
    assert json.loads(document.decode())["predictions"][1]["path"] == odd
    missing = subprocess.run([*command, "none\udcff.png"], capture_output=True, check=False, env=env)
    assert missing.returncode == 1
    assert missing.stderr.decode().splitlines()[-1].startswith("error: no image at none\\udcff.png")
