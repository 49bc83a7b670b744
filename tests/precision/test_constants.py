"""Constants are computed once, and nothing else of the graph changes."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.artifact.onnxfile import model_precision
from deploy.precision.constants import FoldConstants
from tests.precision.conftest import cpu_graph, prepared


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    return ir.to_proto(FoldConstants()(prepared(model)).model)


def with_weight(model: onnx.ModelProto, *shape: int, dtype: Any = np.float32) -> onnx.ModelProto:
    weight = np.random.default_rng(0).normal(size=shape).astype(dtype)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    del model.graph.value_info[:]
    return model


@pytest.mark.parametrize(
    ("weight", "body"),
    [
        ("float16[300, 400]", "v = Cast<to = 1>(w) y = MatMul(x, v)"),
        ("float16[400, 300]", "v = Cast<to = 1>(w) t = Transpose(v) y = MatMul(x, t)"),
        ("float16[400, 300]", "t = Transpose(w) v = Cast<to = 1>(t) y = MatMul(x, v)"),
        ("float16[120000]", "s = Constant<value_ints = [300, 400]>() v = Cast<to = 1>(w) t = Reshape(v, s) y = MatMul(x, t)"),
    ],
)
def test_weights_in_fp16_behind_a_cast_are_fp32_weights_of_any_size(parse, weight: str, body: str) -> None:
    model = parse(f"g (float[N, 300] x) => (float[N, 400] y) <{weight} w> {{ {body} }}")
    shape = [dim.dim_value for dim in model.graph.value_info[0].type.tensor_type.shape.dim]
    model = with_weight(model, *shape, dtype=np.float16)
    assert model_precision(ir.from_proto(model)) == "fp32"
    after = folded(model)
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    x = {"x": np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)}
    np.testing.assert_allclose(cpu_graph(after)(x)["y"], cpu_graph(model)(x)["y"], rtol=1e-5, atol=1e-4)


def test_weights_that_are_used_in_fp16_are_fp16(parse) -> None:
    text = "g (float16[N, 30] x) => (float16[N, 40] y) <float16[30, 40] w> { y = MatMul(x, w) }"
    assert model_precision(ir.from_proto(with_weight(parse(text), 30, 40, dtype=np.float16))) == "fp16"


def test_an_if_of_a_constant_condition_becomes_its_branch_and_the_output_keeps_its_name_and_shape(parse) -> None:
    model = parse(
        """g (float[N, 4] x) => (float[N, 3] y) <float[4, 3] w> {
            c = Constant<value = bool {1}>()
            y = If(c) <then_branch = t () => (float[a, b] p) { p = MatMul(x, w) },
                       else_branch = e () => (float[a, b] q) { q = Identity(x) }> }"""
    )
    after = folded(with_weight(model, 4, 3))
    assert [node.op_type for node in after.graph.node] == ["MatMul"]
    assert [value.name for value in after.graph.output] == ["y"]
    assert [dim.dim_param or dim.dim_value for dim in after.graph.output[0].type.tensor_type.shape.dim] == ["N", 3]


def test_pairs_of_q_and_dq_and_what_would_grow_stay(parse) -> None:
    model = parse(
        """g (float[N, 4] x) => (float[N, 4] y, float[2000, 2000] z) <int8[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}, float s = {0.5}> {
            v = DequantizeLinear(w, s) y = MatMul(x, v)
            n = Constant<value_ints = [2000, 2000]>() z = ConstantOfShape(n) }"""
    )
    assert [node.op_type for node in folded(model).graph.node] == ["DequantizeLinear", "MatMul", "ConstantOfShape"]


def test_folding_again_changes_nothing(parse) -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { a = Constant<value_float = 2.0>() b = Neg(a) y = Mul(x, b) }")
    once = FoldConstants()(prepared(model)).model
    assert not FoldConstants()(once).modified
