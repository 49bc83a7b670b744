"""What counts as INT8 in a network that the real TensorRT-RTX parser made."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploy.engine.attestation import network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.macs import count_macs
from deploy.tensors import ShapeRange

INITIALIZERS = "float s = {0.05}, int8 z = {0}, float ws = {0.02}"
ACTIVATION = "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)"
WEIGHT = "c = DequantizeLinear(w, ws, z)"


@pytest.mark.parametrize(
    ("shape", "weight", "body", "expected"),
    [
        ("2, 4, 8, 8", "int8[8, 4, 3, 3]", f"{ACTIVATION} {WEIGHT} [n] y = Conv(b, c)", "int8"),
        ("2, 4, 8, 8", "float[8, 4, 3, 3]", f"{ACTIVATION} [n] y = Conv(b, w)", "fp32"),
        ("2, 4, 8, 8", "int8[8, 4, 3, 3]", f"{WEIGHT} [n] y = Conv(x, c)", "fp32"),
        ("2, 4, 8, 8", "int8[8, 4, 3, 3]", f"{ACTIVATION} {WEIGHT} r = Relu(b) [n] y = Conv(r, c)", "fp32"),
        ("2, 4, 8", "int8[8, 4, 3]", f"{ACTIVATION} {WEIGHT} [n] y = Conv(b, c)", "int8"),
        ("2, 4, 8, 8", "int8[4, 8, 3, 3]", f"{ACTIVATION} {WEIGHT} [n] y = ConvTranspose(b, c)", "int8"),
        ("2, 5, 4", "int8[4, 8]", f"{ACTIVATION} {WEIGHT} [n] y = MatMul(b, c)", "int8"),
        ("2, 5, 4", "float[4, 8]", f"{ACTIVATION} [n] y = MatMul(b, w)", "fp32"),
    ],
    ids=["conv", "float weight", "float activation", "relu between", "conv1d", "transposed", "broadcast", "float matrix"],
)
def test_a_layer_is_int8_when_both_operands_are(tmp_path: Path, shape: str, weight: str, body: str, expected: str) -> None:
    rank = shape.count(",") + 1
    output = ", ".join("abcd"[:rank])
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 19]> g (float[{shape}] x) => (float[{output}] y) <{INITIALIZERS}, {weight} w> {{ {body} }}'
    )
    declared = model.graph.value_info[0].type.tensor_type
    ones = np.ones([dim.dim_value for dim in declared.shape.dim], onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type))
    model.graph.initializer.append(onnx.numpy_helper.from_array(ones, "w"))
    del model.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    sizes = tuple(map(int, shape.split(",")))
    rtx = load_flavour("tensorrt-rtx")
    built = build_engine(rtx, path, [{"x": ShapeRange(min=sizes, opt=sizes, max=sizes)}], BuildOptions())
    share, by_node = network_share(built.network.definition, rtx.trt, count_macs(path, {"x": sizes}))
    assert by_node == {"n": expected}
    assert getattr(share, expected) == 1
