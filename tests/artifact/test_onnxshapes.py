"""What a file declares of its shapes may be missing or stale; what follows from its inputs counts."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from deploy.artifact.onnxfile import open_onnx
from deploy.artifact.onnxshapes import dim_name, infer_shapes, slim_proto
from deploy.precision.passes import VALID
from deploy.precision.prepare import Prepare


def parsed(text: str, opset: int = 20) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}'))


def shapes(model: ir.Model) -> dict[str, list[int | str | None] | None]:
    infer_shapes(model)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {
        value.name or "": None
        if value.shape is None
        else [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        for value in values
    }  # fmt: skip


@pytest.mark.parametrize("external", [False, True])
def test_large_weights_become_inputs_and_small_constants_stay(tmp_path: Path, external: bool) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> '
        "g (float[N, 400] x) => (float[a, b] y) <float[400, 2] w, int64[2] s = {-1, 1}> { a = MatMul(x, w) y = Reshape(a, s) }"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((400, 2), np.float32), "w"))
    del proto.graph.value_info[:]
    ir.save(ir.from_proto(proto), tmp_path / "m.onnx", external_data="m.data" if external else None, size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    slim = slim_proto(model)
    assert [value.name for value in slim.graph.input] == ["x", "w"]
    assert [tensor.name for tensor in slim.graph.initializer if not tensor.external_data] == ["s"]
    inferred = onnx.shape_inference.infer_shapes(slim, strict_mode=True, data_prop=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1
    assert set(model.graph.initializers) == {"s", "w"}


@pytest.mark.parametrize(
    ("dim", "name"),
    [("N", "N"), ("floor(H/2)", "floor(H/2)"), ("?", ""), ("-1", ""), ("", ""), ("None", ""), (None, ""), (7, "")],
)
def test_only_what_names_a_size_is_a_name(dim: object, name: str) -> None:
    assert dim_name(dim) == name


def test_sizes_without_a_name_get_one_each_and_are_followed_through_the_graph() -> None:
    model = parsed("g (float[n, 3, h, w] x) => (float[n, 3, h, w] y) { a = Relu(x) y = Abs(a) }")
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([-1, 3, "?", "?"])
    assert shapes(model) == {name: ["x_0", 3, "x_2", "x_3"] for name in ("x", "a", "y")}
    assert not infer_shapes(model)


def test_an_input_that_is_an_output_too_keeps_its_shape() -> None:
    model = parsed("g (float[N, 4] x) => (float[N, 4] y, float[N, 4] x) { y = Relu(x) }")
    assert shapes(model) == {"x": ["N", 4], "y": ["N", 4]}


def test_a_new_name_is_not_one_that_is_there() -> None:
    model = parsed("g (float[x_1, a] x) => (float[x_1, a] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape(["x_1", "?"])
    assert shapes(model)["x"] == ["x_1", "x_1_"]


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ("1, 8", ["n", 8]),  # the batch was 1 once
        ("n", ["n", 8]),  # another rank
        ("n, 9", ["n", 8]),
        ("rows, cols", ["n", 8]),
    ],
)
def test_what_is_declared_gives_way_to_what_follows(declared: str, expected: list[int | str]) -> None:
    model = parsed(f"g (float[n, 4] x, float[4, 8] w) => (float[{declared}] y) {{ y = MatMul(x, w) }}")
    assert shapes(model)["y"] == expected


def test_sizes_that_do_not_follow_are_kept_until_one_turns_out_to_be_wrong() -> None:
    text = "g (float[n, 4] x, int64[2] s) => (float[{}] y) <float[6, 2] a> {{ a = Reshape(x, s) b = Relu(x) y = Abs(b) }}"
    assert shapes(parsed(text.format("n, 4")))["a"] == [6, 2]
    assert shapes(parsed(text.format("1, 4")))["a"] == [None, None]


def test_a_normalization_that_onnx_does_not_infer_keeps_the_shape_of_its_input() -> None:
    text = "g (float[n, 4, 8] x, float[4] s, float[4] b) => (float[p, q, r] y) {{ {} y = Relu(a) }}"
    for body, opset in (
        ("a = GroupNormalization<num_groups = 2>(x, s, b)", 21),
        ("a = LayerNormalization(x, s, b)", 16),  # which ONNX Runtime had before ONNX
    ):
        assert shapes(parsed(text.format(body), opset))["y"] == ["n", 4, 8]


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
