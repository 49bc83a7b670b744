"""`deploy.verify.hints`: advice holds where it is given."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import deploy
from deploy.verify.verify import verify
from tests.verify.conftest import Change, Write, multiply


def halved(source: Path, to: Path) -> Path:
    """The file with every weight and tensor in FP16, as tools write it that look at no values."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    casts = [helper.make_node("Cast", ["x"], ["x16"], to=10), helper.make_node("Cast", ["y16"], ["y"], to=1)]
    for node in model.graph.node:
        node.input[:] = ["x16" if name == "x" else name for name in node.input]
        node.output[:] = ["y16" if name == "y" else name for name in node.output]
    model.graph.node.insert(0, casts[0])
    model.graph.node.append(casts[1])
    del model.graph.value_info[:]
    onnx.save(model, to)
    return to


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        pytest.param([multiply("w1", 3e4)], "its values reach", id="an overflow"),
        pytest.param([multiply("w1", 1e-7)], "100% of its values are below 6.1e-05", id="small values"),
        pytest.param([multiply("w1", 3e-6)], "--bf16 rounds them less", id="values of few bits"),
    ],
)
def test_of_fp16_it_is_said_which_end_of_its_range_was_passed(
    write: Write, tmp_path: Path, changes: list[Change], said: str
) -> None:
    source = write("a.onnx", *changes)
    found = verify(source, halved(source, tmp_path / "half.onnx"))
    assert found.culprits[0].tensor == "c1"
    assert said in found.hints["c1"]


def test_what_is_advised_for_small_values_helps(write: Write, tmp_path: Path) -> None:
    source = write("a.onnx", multiply("w1", 1e-7))
    found = verify(source, halved(source, tmp_path / "half.onnx"))
    assert "`deploy convert --fp16` keeps such a layer in FP32" in found.hints["c1"]
    converted = deploy.convert(deploy.export(tmp_path / "a", onnx=source), tmp_path / "b", precision="fp16")
    assert not verify(tmp_path / "a", converted).culprits
