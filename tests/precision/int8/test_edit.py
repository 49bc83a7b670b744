"""Edits keep names apart, and nothing that is still read goes."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.errors import PrecisionError
from deploy.precision.cpu import CpuGraph
from deploy.precision.int8.edit import GraphEdit, bias_place

NET = """g (float[2, 4] x) => (float[] y) <float[4, 4] w, float[4] b, float[2, 4] rows> {
    [first] m = MatMul(x, w) a = Add(m, b) [second] n = MatMul(a, w) c = Add(n, rows) [third] y = Gemm(c, w, b) }"""


@pytest.fixture
def edit(build: Callable[[str], onnx.ModelProto]) -> GraphEdit:
    return GraphEdit(ir.from_proto(build(NET)).graph)


def test_names_that_are_taken_get_a_number(edit: GraphEdit) -> None:
    names = [edit.initializer(name, np.zeros(1, np.float32)).name for name in ("w", "first", "new", "new")]
    assert names == ["w_2", "first_2", "new", "new_2"]


def test_an_initializer_is_dropped_only_if_nothing_reads_it(edit: GraphEdit) -> None:
    edit.drop(edit.graph.initializers["w"])
    edit.drop(edit.initializer("idle", np.zeros(1, np.float32)))
    assert set(edit.graph.initializers) == {"w", "b", "rows"}


def test_nodes_without_a_maker_before_them_come_first(edit: GraphEdit) -> None:
    for name, place in (("x", 0), ("m", 2)):
        value = edit.values[name]
        edit.insert_behind(value, [edit.node("Neg", [value], name, edit.value(f"{name}_negated", value, ir.DataType.FLOAT))])
        assert edit.graph[place].name == f"{name}/Neg"


def test_the_bias_of_a_product_is_the_vector_that_is_added_behind_it(edit: GraphEdit) -> None:
    assert [bias_place(edit.nodes[name]) is not None for name in ("first", "second", "third")] == [True, False, True]


def test_a_bias_that_two_layers_share_changes_for_one(edit: GraphEdit) -> None:
    edit.add_bias("first", np.ones(4, np.float32))
    assert edit.nodes["third"].inputs[2] is edit.graph.initializers["b"]
    edit.add_bias("third", np.ones(4, np.float32))
    assert "b" not in edit.graph.initializers
    with pytest.raises(PrecisionError, match="no node is named 'fourth'"):
        edit.add_bias("fourth", np.ones(4, np.float32))


def test_a_computed_bias_that_is_changed_twice_gets_one_addition(build: Callable[[str], onnx.ModelProto]) -> None:
    """As of a Gemm that is smoothed, and then corrected."""
    model = ir.from_proto(
        build("g (float[2, 4] x, float[3] b) => (float[] y) <float[4, 3] w> { c = Neg(b) [layer] y = Gemm(x, w, c) }")
    )
    for _ in range(2):
        GraphEdit(model.graph).add_bias("layer", np.ones(3, np.float32))
    assert [node.op_type for node in model.graph] == ["Neg", "Add", "Gemm"]
    holder, index = bias_place(next(node for node in model.graph if node.name == "layer"))
    np.testing.assert_array_equal(holder.inputs[index].const_value.numpy(), np.full(3, 2))
    feed = {"x": np.ones((2, 4), np.float32), "b": np.ones(3, np.float32)}
    w = model.graph.initializers["w"].const_value.numpy()
    np.testing.assert_allclose(CpuGraph(model)(feed)["y"], feed["x"] @ w + 1, rtol=1e-6)
