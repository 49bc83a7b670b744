"""A graph in half precision, in memory."""

import onnx
import onnx_ir
import pytest

from deploy.precision.formats import ConvertOptions
from deploy.precision.half.convert import convert_onnx
from tests.precision.half.artifacts import make_artifact

FP16 = ConvertOptions(precision="fp16")


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path / "net")


def test_progress_is_told(artifact):
    told = []
    convert_onnx(artifact, None, FP16, lambda what, done=0, total=0: told.append((what, done, total)))
    assert ("reading activation ranges", 3, 8) in told  # rows


def test_the_graph_can_be_had_without_an_artifact(artifact, tmp_path):
    made = convert_onnx(artifact, None, FP16)
    made.save(tmp_path / "typed.onnx")
    assert onnx.load(tmp_path / "typed.onnx") == onnx_ir.to_proto(made.model)
    assert [spec.name for spec in (*made.inputs, *made.outputs)] == ["image", "scores"]
