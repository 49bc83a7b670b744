"""`deploy verify`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from deploy.artifact.artifact import Artifact

Run = Callable[..., Any]


@pytest.fixture
def broken(shared_lenet5: Artifact, tmp_path: Path) -> Path:
    """A copy of the file whose second convolution has its channels in another order."""
    model = onnx.load(shared_lenet5.onnx_path)
    for tensor in model.graph.initializer:
        if tensor.name == "conv2.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    onnx.save(model, tmp_path / "broken.onnx")
    return tmp_path / "broken.onnx"


def test_a_culprit_is_named_with_its_module_and_ends_with_status_1(
    run: Run, shared_lenet5: Artifact, broken: Path, tmp_path: Path
) -> None:
    finished = run("verify", shared_lenet5.path, broken, "--reproduce", tmp_path / "small", "--report", tmp_path / "v.html")
    assert finished.status == 1
    lines = finished.out.splitlines()
    assert len(lines) <= 20
    culprit = next(line for line in lines if line.startswith("  culprit"))
    assert "conv2/Conv (Conv, module conv2, lenet5.py:" in culprit
    assert (tmp_path / "small" / "b.onnx").is_file()
    html = (tmp_path / "v.html").read_text(encoding="utf-8")
    assert html.count("<circle") == 1
    assert "conv2/Conv" in html


def test_a_copy_is_right_and_says_how_near_the_floor_it_is(run: Run, shared_lenet5: Artifact) -> None:
    finished = run("verify", shared_lenet5.path, shared_lenet5.path)
    assert finished.status == 0
    assert "culprit    none" in finished.out


def test_json_is_one_document(run: Run, shared_lenet5: Artifact, broken: Path) -> None:
    finished = run("verify", shared_lenet5.path, broken, "--json")
    assert finished.status == 1
    assert json.loads(finished.out)["culprits"][0]["node"] == "conv2/Conv"


def test_no_kin_is_wrong_usage(run: Run, shared_lenet5: Artifact, tiny_onnx: Path) -> None:
    finished = run("verify", shared_lenet5.path, tiny_onnx)
    assert (finished.status, "not of one network" in finished.err) == (2, True)
