import onnx
import pytest

from deploy.errors import PrecisionError
from tests.precision.conftest import prepare


def test_preparing_keeps_names_and_gives_unnamed_and_doubly_named_nodes_names_of_their_own(parse):
    model = parse("g (float[N] x) => (float[N] y) { [first] a = Relu(x) b = Abs(a) [first] y = Neg(b) }")
    names = [node.name for node in prepare(model).graph.node]
    assert names == ["first", "Abs_1", "first_2"]


def test_preparing_twice_is_preparing_once(parse):
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { c = Constant<value_float = 2.5>() a = Mul(x, c) y = Relu(a) }")
    prepared = prepare(model)
    assert prepare(prepared) == prepared


def test_constants_become_initializers_and_types_are_noted(parse):
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { c = Constant<value_float = 2.5>() a = Mul(x, c) y = Relu(a) }")
    prepared = prepare(model)
    assert [node.op_type for node in prepared.graph.node] == ["Mul", "Relu"]
    assert [tensor.name for tensor in prepared.graph.initializer] == ["c"]
    types = {value.name: value.type.tensor_type.elem_type for value in prepared.graph.value_info}
    assert types["a"] == onnx.TensorProto.FLOAT


def test_initializers_that_are_inputs_as_well_are_inputs_no_more(parse):
    model = parse("g (float[N, 1] x, float[1] w = {2.0}) => (float[N, 1] y) { y = Mul(x, w) }")
    assert [value.name for value in model.graph.input] == ["x", "w"]
    assert [value.name for value in prepare(model).graph.input] == ["x"]


@pytest.mark.parametrize("opset", [1, 22])
@pytest.mark.parametrize("written", [13, 20])
def test_local_functions_are_inlined_also_before_the_opset_is_converted(written, opset):
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {written}, "local": 1]>
        g (float[N] x) => (float[N] y) {{ y = local.double(x) }}
        <domain: "local", opset_import: ["": {written}]>
        double (a) => (b) {{ b = Add(a, a) }}"""
    )
    prepared = prepare(model, opset=opset)
    assert [node.op_type for node in prepared.graph.node] == ["Add"]
    assert not prepared.functions


@pytest.mark.parametrize("opset", [13, 20])
def test_an_older_opset_is_converted_with_what_changed_since(parse, opset):
    axes = "<axes = [2]>(x)" if opset == 13 else "(x, axes)"
    constant = "" if opset == 13 else "axes = Constant<value_ints = [2]>()"
    model = parse(f"g (float[N, 4, 8] x) => (float[N, 4, 1] y) {{ {constant} y = ReduceMean{axes} }}", opset)
    model.ir_version = 8
    prepared = prepare(model, opset=22)
    assert prepared.ir_version >= 10  # the first for opset 22
    onnx.checker.check_model(prepared, full_check=True)
    assert next(entry.version for entry in prepared.opset_import if entry.domain == "") == 22
    assert len(prepared.graph.node[0].input) == 2  # axes are an input since opset 18


def test_a_newer_opset_stays(parse):
    prepared = prepare(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", 23), opset=22)
    assert next(entry.version for entry in prepared.opset_import if entry.domain == "") == 23


def test_an_invalid_graph_is_refused_with_the_node(parse):
    with pytest.raises(PrecisionError, match=r"not valid ONNX: .*Mul_0"):
        prepare(parse("g (float[N] x, int64[N] i) => (float[N] y) { y = Mul(x, i) }"))
