"""What ONNX Runtime takes although ONNX's checker does not."""

import onnx
import pytest

from deploy.artifact.accepted import refusal


def serialized(body: str, opset: int, kind: str = "float") -> bytes:
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({kind}[2, 4] x, {kind}[4] s) => ({kind}[2, 4] y) {{ {body} }}'
    return onnx.parser.parse_model(text).SerializeToString()


def test_operators_that_onnx_has_deprecated_or_did_not_have_yet_are_taken() -> None:
    assert refusal(serialized("y = LayerNormalization(x, s)", 16)) == ""
    assert refusal(serialized("y = SimplifiedLayerNormalization(x, s)", 16)) == ""


@pytest.mark.parametrize("body", ["y = Swirl(x)", "y = Add(x, z)", "y = Relu<lost = 1>(x)"])
def test_what_it_cannot_make_sense_of_is_refused_with_a_reason(body: str) -> None:
    assert refusal(serialized(body, 20))


def test_a_missing_kernel_is_no_fault_of_the_graph() -> None:
    assert refusal(serialized("y = Asinh(x)", 22, "bfloat16")) == ""
