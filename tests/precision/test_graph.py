import onnx
import onnx_ir as ir

from deploy.precision.graph import first_line, unknown_nodes, unused


def test_unused_counts_on_from_a_taken_name():
    assert unused("a", {"b"}) == "a"
    assert unused("a", {"a", "a_2"}) == "a_3"


def test_the_first_line_is_that_of_the_innermost_error():
    outer = ValueError("outer")
    outer.__cause__ = KeyError("\n  what went wrong \n where")
    assert first_line(RuntimeError("  one\ntwo")) == "one"
    assert "what went wrong" in first_line(outer)
    assert first_line(RuntimeError()) == "RuntimeError"


def test_nodes_that_neither_onnx_nor_the_model_defines_are_unknown():
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20, "local": 1, "my": 1]>
        g (float[N] x) => (float[N] y) { [known] a = Relu(x) [local] b = local.double(a) [odd] y = my.Foo(b) }
        <domain: "local", opset_import: ["": 20]> double (a) => (b) { b = Add(a, a) }"""
    )
    assert [node.name for node in unknown_nodes(ir.from_proto(model))] == ["odd"]
