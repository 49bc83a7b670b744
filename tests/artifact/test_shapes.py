"""Shapes that a file records wrongly are overruled by what its operators give, as ONNX Runtime does."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.shapes import overruled
from deploy.errors import ArtifactError
from deploy.precision.passes import VALID
from deploy.precision.prepare import Prepare

BODY = """<ir_version: 9, opset_import: ["" : 17]>
g (float[N, 3, 4] x) => (float[N, 3] y, float[N, 9] z) <float[7, 7, 7, 7] inner> {
  shape = Constant<value_ints = [0, -1]>()
  inner = Relu(x)
  y = Identity(inner)
  z = Reshape(inner, shape)
}"""


def file_of(tmp_path: Path, y: list[int | str] | None, z: list[int | str] | None, inner: list[int] | None) -> Path:
    """A file whose outputs y (really N x 3 x 4) and z (N x 12), and a value inside (as y), have these shapes recorded."""
    model = onnx.parser.parse_model(BODY)
    for value, shape in zip((*model.graph.output, *model.graph.value_info), (y, z, inner), strict=True):
        value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


WRONG: dict[str, tuple[list[int | str] | None, list[int | str] | None, list[int] | None]] = {
    "too few": (["N", "L"], ["N", 12], None),
    "too many": (["N", 3, 4], ["N", 3, 2, 2], None),
    "other sizes": (["N", 3, 5], ["N", 9], None),
    "none": (None, None, None),
    "inside": (["N", 3, 4], ["N", 12], [2, 2]),
    "a scalar": ([], ["N", 12], [1]),
}


@pytest.mark.parametrize(("y", "z", "inner"), WRONG.values(), ids=WRONG)
def test_a_wrong_shape_is_overruled_for_the_manifest_and_the_passes(
    y: list[int | str] | None, z: list[int | str] | None, inner: list[int] | None, tmp_path: Path
) -> None:
    path = file_of(tmp_path, y, z, inner)
    outputs = open_onnx(path).manifest.outputs
    assert [str(spec) for spec in outputs] == ["y: float32 Nx3x4", "z: float32 Nx12"]
    model = onnx.load(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(None, {"x": np.ones((2, 3, 4), np.float32)})
    assert [array.shape for array in given] == [(2, 3, 4), (2, 12)]
    graph = ir.from_proto(model)
    Prepare()(graph)
    assert VALID.violation(graph) == ""
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    assert [array.shape for array in session.run(None, {"x": np.ones((2, 3, 4), np.float32)})] == [(2, 3, 4), (2, 12)]


def test_what_is_recorded_right_or_more_exactly_stays(tmp_path: Path) -> None:
    path = file_of(tmp_path, ["N", 3, 4], ["M", "L"], [2, 3, 4])
    assert overruled(onnx.load(path)) == {}
    assert [str(spec) for spec in open_onnx(path).manifest.outputs] == ["y: float32 Nx3x4", "z: float32 MxL"]


def test_large_weights_are_not_needed_and_a_rank_that_nothing_tells_is_named(tmp_path: Path) -> None:
    weight = np.ones((64, 64), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Reshape", ["x", "s"], ["z"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["N", 64]), helper.make_tensor_value_info("s", 7, ["K"])],
        [helper.make_tensor_value_info("y", 1, ["N"])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert [dim.dim_param or dim.dim_value for dim in overruled(model)["y"].dim] == ["N", 64]
    model.graph.output.append(helper.make_tensor_value_info("z", 1, None))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="'z' of the ONNX file is not a tensor of a known dtype and rank"):
        open_onnx(tmp_path / "model.onnx")
