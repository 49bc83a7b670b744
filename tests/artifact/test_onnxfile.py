"""Bare ONNX files."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.artifact.onnxfile import load_model, model_precision, open_onnx, save_model
from deploy.errors import ArtifactError
from deploy.precision.cpu import CpuGraph
from deploy.precision.prepare import Prepare


def test_an_operator_that_onnx_does_not_have_is_named_with_its_file_and_node(tmp_path: Path) -> None:
    graph = '<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x) [odd] y = Swirl(a) }'
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "odd.onnx")
    with pytest.raises(
        ArtifactError, match=r"odd\.onnx is not a valid ONNX file: No Op registered for Swirl .*\(node 'odd', Swirl\)$"
    ):
        open_onnx(tmp_path / "odd.onnx")


def with_external_weights(folder: Path, *, opset: int = 20) -> Path:
    """y = reshape(x @ w, shape): w is large, the shape is not, and both are in a file beside."""
    weights = [
        onnx.numpy_helper.from_array(np.arange(800, dtype=np.float32).reshape(400, 2), "w"),
        onnx.numpy_helper.from_array(np.array([1, -1], np.int64), "shape"),
    ]
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["a"]), onnx.helper.make_node("Reshape", ["a", "shape"], ["y"])]
    ends = [onnx.helper.make_tensor_value_info(*each) for each in (("x", 1, ("n", 400)), ("y", 1, (1, "m")))]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    ir.save(model, folder / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    return folder / "m.onnx"


def test_large_external_weights_are_mapped_and_constants_of_shapes_read(tmp_path: Path) -> None:
    model = load_model(with_external_weights(tmp_path))
    kinds = {name: isinstance(value.const_value, ir.ExternalTensor) for name, value in model.graph.initializers.items()}
    assert kinds == {"w": True, "shape": False}


@pytest.mark.parametrize(("limit", "files"), [(None, ["model.onnx"]), (100, ["model.onnx", "model.onnx.data"])])
def test_a_graph_with_external_weights_is_written_whole(tmp_path: Path, limit: int | None, files: list[str]) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    save_model(load_model(with_external_weights(source)), out / "model.onnx", external_over=limit)
    shutil.rmtree(source)
    assert sorted(path.name for path in out.iterdir()) == files
    model = onnx.load(out / "model.onnx")
    assert onnx.numpy_helper.to_array(model.graph.initializer[0]).tolist() == np.arange(800).reshape(400, 2).tolist()


@pytest.mark.parametrize("opset", [11, 18])
def test_weights_in_a_file_beside_are_kept_when_the_opset_is_converted(tmp_path: Path, opset: int) -> None:
    model = load_model(with_external_weights(tmp_path, opset=opset))
    Prepare(opset=22)(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    x = np.ones((3, 400), np.float32)
    expected = (x @ np.arange(800, dtype=np.float32).reshape(400, 2)).reshape(1, -1)
    np.testing.assert_allclose(CpuGraph(model)({"x": x})["y"], expected)


@pytest.mark.parametrize("version", [3, 4, 8])
def test_inputs_that_have_a_weight_are_weights(tmp_path: Path, version: int) -> None:
    """As every exporter wrote files before IR version 4."""
    text = f"""<ir_version: {version}, opset_import: ["" : 9]>
        g (float[n, 2] x, float[2, 3] w = {{1, 2, 3, 4, 5, 6}}, float[3] b = {{1, 1, 1}}) => (float[n, 3] y) {{ y = Gemm(x, w, b) }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "old.onnx")
    assert [spec.name for spec in open_onnx(tmp_path / "old.onnx").manifest.inputs] == ["x"]


@pytest.mark.parametrize(("codes", "expected"), [("int8", "int8"), ("uint8", "int8"), ("float8e4m3fn", "fp8")])
def test_the_precision_of_a_quantized_file_is_that_of_its_codes(codes: str, expected: str) -> None:
    pair = f"g (float[N, 4] x, {codes} z) => (float[N, 4] y) <float s = {{0.5}}> {{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}"
    weight = f"g (float[N, 4] x, {codes}[4, 4] w) => (float[N, 4] y) <float s = {{0.5}}> {{ v = DequantizeLinear(w, s) y = MatMul(x, v) }}"
    for text in (pair, weight):
        assert (
            model_precision(ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]> {text}')))
            == expected
        )
