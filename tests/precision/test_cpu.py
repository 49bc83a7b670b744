import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.errors import BackendError, PrecisionError
from deploy.onnxfile import save_model
from deploy.precision.cpu import CpuGraph, weight_bytes
from deploy.precision.half import to_half

MODEL = "g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }"


def test_outputs_come_by_name(parse):
    found = CpuGraph(parse(MODEL))({"x": np.eye(2, dtype=np.float32)})
    assert found["y"].tolist() == [[1, 2], [3, 4]]


def test_a_graph_that_onnxruntime_lacks_an_operator_for_is_an_error_with_its_name(parse):
    with pytest.raises(PrecisionError, match="does not know node 'odd': it is operator Foo of domain my;"):
        CpuGraph(parse("g (float[N] x) => (float[N] y) { [known] a = com.microsoft.QuickGelu(x) [odd] y = my.Foo(a) }"))


def test_a_graph_that_onnxruntime_cannot_load_for_another_reason_is_an_error_that_says_it(parse):
    with pytest.raises(PrecisionError, match=r"cannot load the graph: .*QuickGelu"):
        CpuGraph(parse("g (float[N] x, float[N] z) => (float[N] y) { y = com.microsoft.QuickGelu(x, z) }"))


def test_weights_over_the_limit_go_into_a_file_beside(parse, tmp_path, monkeypatch):
    model, _ = to_half(parse(MODEL), "fp16")
    assert weight_bytes(model) == 8
    save_model(ir.from_proto(model), tmp_path / "small.onnx")
    save_model(ir.from_proto(model), tmp_path / "large.onnx", external_over=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert onnx.load(tmp_path / "large.onnx").graph.initializer[0].raw_data == model.graph.initializer[0].raw_data
    assert model.graph.initializer[0].raw_data  # as it was

    monkeypatch.setattr("deploy.onnxfile.EXTERNAL_DATA_BYTES", 7)
    assert CpuGraph(model)({"x": np.eye(2, dtype=np.float32)})["y"].tolist() == [[1, 2], [3, 4]]


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "deploy.precision.cpu")
    with pytest.raises(BackendError, match=r"install deploy\[cpu\]"):
        import deploy.precision.cpu  # noqa: F401
