"""`deploy predict`."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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


def test_files_that_cannot_be_used_are_named_and_the_others_have_their_results(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    refused(run("predict", "build/lenet5", "images/none.png"), 1, "images/none.png")
    (folder / "images" / "digit 3" / "1.png").write_bytes(b"no image")
    (folder / "empty").mkdir()
    given = ("images/digit 3", "images/none.png", "empty", "images/digit 7/0.png")
    finished = run("predict", "build/lenet5", *given)
    assert finished.status == 1
    assert [line.partition(": ")[0] for line in finished.out.splitlines()] == ["images/digit 3/0.png", "images/digit 7/0.png"]
    *named, last = [line for line in finished.err.splitlines() if "images/" in line or "empty" in line or "file" in line]
    assert last == "3 files could not be used"
    for name in ("images/none.png", "empty", "images/digit 3/1.png"):
        assert any(line.startswith("error: ") and name in line for line in named), finished.err
    document = json.loads(run("predict", "build/lenet5", *given, "--json").out)
    assert [each["path"] for each in document["predictions"]] == ["images/digit 3/0.png", "images/digit 7/0.png"]
    assert sorted(each["path"] for each in document["failed"]) == ["empty", "images/digit 3/1.png", "images/none.png"]


def test_names_that_are_not_utf8_are_printed_and_are_json(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    strange = os.fsencode(folder / "images" / "digit 3") + b"/caf\xe9.png"
    shutil.copy(folder / "images" / "digit 3" / "0.png", strange)
    with open(os.fsencode(folder / "images" / "digit 7") + b"/\xff.png", "wb") as file:
        file.write(b"no image")
    finished = run("predict", "build/lenet5", "images")
    assert "images/digit 3/caf\\xe9.png: " in finished.out.encode("utf-8").decode()
    assert r"images/digit 7/\xff.png" in finished.err
    document = json.loads(run("predict", "build/lenet5", "images", "--json").out.encode("utf-8"))
    assert r"images/digit 3/caf\xe9.png" in [each["path"] for each in document["predictions"]]
    assert [each["path"] for each in document["failed"]] == [r"images/digit 7/\xff.png"]


def test_a_name_is_printed_in_one_way_and_on_one_line(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    digit = os.fsencode(folder / "images" / "digit 7")
    shutil.copy(folder / "images" / "digit 3" / "0.png", digit + b"/two\nlines.png")
    for name in (b"/\xff.png", b"/no\nimage.png"):
        with open(digit + name, "wb") as file:
            file.write(b"no image")
    finished = run("predict", "build/lenet5", os.fsdecode(digit), os.fsdecode(b"gone\xe9"))
    shown = (finished.out + finished.err).encode("utf-8", "show_bytes").decode().splitlines()
    for name in (r"digit 7/two\nlines.png: ", r"digit 7/\xff.png ", r"digit 7/no\nimage.png ", r"no image at gone\xe9"):
        assert any(name in line for line in shown), shown
    document = json.loads(run("predict", "build/lenet5", os.fsdecode(digit), "--json").out)
    assert any(each["path"].endswith("digit 7/two\nlines.png") for each in document["predictions"])


def test_out_takes_lists_and_patterns_and_writes_a_row_for_each(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    (folder / "list.txt").write_text("images/digit 7/0.png\nimages/none.png\n", encoding="utf-8")
    finished = run("predict", "images/*3", "list.txt", "--out", "rows.jsonl", "--top", "1")
    assert (finished.status, finished.out) == (1, "4 rows in rows.jsonl, 1 error\n")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [(row["path"], "error" in row) for row in rows] == [
        ("images/digit 3/0.png", False), ("images/digit 3/1.png", False), ("images/digit 7/0.png", False), ("images/none.png", True),
    ]  # fmt: skip
    refused(run("predict", "images", "--out", "rows.csv"), 2, "lenet5 is a classifier, and there are no pictures", "FILE.jsonl")
    refused(
        run("predict", "images", "--out", "other.jsonl", "--min-score", "0.5"), 2, "--min-score is for the boxes of detectors"
    )
    refused(run("predict", "images", "--batch-size", "2"), 2, "--batch-size needs --out")
    refused(run("predict", "images", "--out", "other.jsonl", "--actors", "2"), 2, "--actors needs --ray")


def test_out_takes_what_no_task_knows_and_says_so(run: Run, folder: Path) -> None:
    from onnx import parser, save

    text = """<ir_version: 10, opset_import: ["": 20]> g (float[N, 2] x) => (float[N, 2, 2] y)
        <int64[1] axis = {2}, int64[3] size = {1, 1, 2}> { wide = Unsqueeze(x, axis) y = Expand(wide, size) }"""
    save(parser.parse_model(text), "net.onnx")
    np.savez("x.npz", x=np.array([[1, 2], [3, 4]], np.float32))
    finished = run("predict", "net.onnx", "x.npz", "--out", "rows.jsonl")
    assert (finished.status, finished.out) == (0, "2 rows in rows.jsonl, 0 errors\n")
    assert "net.onnx is no classifier, segmenter or detector: its outputs are written as they are" in finished.err
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert [row["outputs"]["y"] for row in rows] == [[[1, 1], [2, 2]], [[3, 3], [4, 4]]]
    refused(
        run("predict", "net.onnx", "x.npz", "--out", "other.jsonl", "--top", "2"), 2, "--top is for the classes of classifiers"
    )
    refused(run("predict", "net.onnx", "x.npz", "--raw"), 2, "--raw needs --out FILE.jsonl")
