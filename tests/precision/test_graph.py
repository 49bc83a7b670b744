import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.precision.graph import first_line, slim_proto, unknown_nodes, unused


def test_unused_counts_on_from_a_taken_name():
    assert unused("a", {"b"}) == "a"
    assert unused("a", {"a", "a_2"}) == "a_3"


def test_the_first_line_is_that_of_the_innermost_error():
    outer = ValueError("outer")
    outer.__cause__ = KeyError("\n  what went wrong \n where")
    assert first_line(RuntimeError("  one\ntwo")) == "one"
    assert "what went wrong" in first_line(outer)
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("external", [False, True])
def test_large_weights_become_inputs_and_small_constants_stay(parse, tmp_path, external):
    proto = parse(
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


def test_nodes_that_neither_onnx_nor_the_model_defines_are_unknown():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20, "local": 1, "my": 1]>
        g (float[N] x) => (float[N] y) { [known] a = Relu(x) [local] b = local.double(a) [odd] y = my.Foo(b) }
        <domain: "local", opset_import: ["": 20]> double (a) => (b) { b = Add(a, a) }"""
    )
    assert [node.name for node in unknown_nodes(ir.from_proto(model))] == ["odd"]
