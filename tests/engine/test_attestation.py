"""What counts as INT8 in a network that the real TensorRT-RTX parser made, and in the inspector's description of an engine.

The descriptions are written after TensorRT's documentation: no engine can be inspected without a GPU.
"""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest

from deploy.artifact.tensors import ShapeRange
from deploy.engine.attestation import check_honoured, engine_layers, engine_share, network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.errors import EngineError
from deploy.precision.macs import count_macs

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
    share, by_node = network_share(built.network.definition, rtx.trt, count_macs(onnx_ir.load(path), {"x": sizes}))
    assert by_node == {"n": expected}
    assert getattr(share, expected) == 1


def layer(name: str, kind: str, tactic: str, inputs: str, *nodes: str) -> dict[str, object]:
    """A layer as the inspector describes it, cut down to what is read; the separator of nodes is TensorRT's."""
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Dimensions": [8, 3, 32, 32], "Format/Datatype": inputs}],
        "Outputs": [{"Name": "y", "Dimensions": [8, 8, 32, 32], "Format/Datatype": inputs}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes),
    }


DESCRIBED = [
    layer("Reformatting input 0", "Reformat", "", "Row major linear FP32"),
    layer("stem", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tile64", "Int8", "stem_dq", "stem", "relu"),
    layer("middle", "CaskConvolution", "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64", "Thirty-two wide Half", "middle"),
    layer("__myl_Fc", "gemm", "", "BFloat16", "head"),
    layer("tail", "CaskGemmMatrixMultiply", "sm80_xmma_gemm_tf32tf32_tf32f32_f32_nn", "Float", "tail"),
]  # fmt: skip
COUNTS = {"stem": 500, "middle": 300, "head": 100, "tail": 50, "fused away": 50}
TYPED = {"stem": "int8", "middle": "int8", "head": "bf16", "tail": "fp32", "fused away": "fp16"}


def test_the_precision_of_an_engine_is_what_its_layers_compute_in() -> None:
    layers = engine_layers(json.dumps({"Layers": DESCRIBED, "Bindings": ["x", "y"]}))
    assert [(found.precision, found.computes, found.nodes) for found in layers[1:]] == [
        ("int8", True, ("stem_dq", "stem", "relu")),
        ("fp16", True, ("middle",)),
        ("bf16", True, ("head",)),
        ("fp32", True, ("tail",)),
    ]
    times = {"stem": 2.0, "middle": 1.0, "__myl_Fc": 0.5, "tail": 0.5}
    share, by_node = engine_share(layers, TYPED, COUNTS, times)
    assert share.origin == "engine"
    assert (share.int8, share.fp16, share.bf16, share.fp32) == pytest.approx((0.5, 0.35, 0.1, 0.05))
    assert share.layers == pytest.approx({"int8": 0.2, "fp16": 0.2, "bf16": 0.2, "fp32": 0.4})
    assert share.time == pytest.approx({"int8": 0.5, "fp16": 0.25, "bf16": 0.125, "fp32": 0.125})
    assert by_node["middle"] == "fp16"  # as it was built, not as it was typed
    assert by_node["fused away"] == "fp16"  # as it was typed: the inspector does not name it
    with pytest.raises(EngineError, match=r"int8 was asked for, and 50% .* middle \(fp16\)"):
        check_honoured("int8", by_node, COUNTS, [], "engine")


def test_a_layer_that_only_moves_data_does_not_give_a_node_its_precision() -> None:
    moves = layer("Reformatting stem", "Reformat", "", "Float", "stem")
    described = json.dumps({"Layers": [DESCRIBED[1], moves]})
    _, by_node = engine_share(engine_layers(described), {"stem": "int8"}, {"stem": 1}, {})
    assert by_node == {"stem": "int8"}


@pytest.mark.parametrize(
    ("described", "reason"),
    [("", "cannot be read"), ("{}", "Layers"), ('{"Layers": ["stem", "tail"]}', "built without detailed verbosity"), ("[1]", "cannot be read")],
)  # fmt: skip
def test_a_description_that_cannot_be_read_is_an_error(described: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        engine_layers(described)


def test_nodes_that_cannot_be_counted_are_unknown_and_the_rest_is_held_to_the_precision() -> None:
    counts = {"stem": 500, "lstm": None, "loop": None, "unseen": 20}
    share, by_node = engine_share([], {"stem": "fp16", "lstm": "fp32"}, counts, {})
    assert (share.fp16, share.fp32, share.unknown) == (1, 0, 3)
    check_honoured("fp16", by_node, counts, [], "engine")
    with pytest.raises(EngineError, match=r"int8 was asked for, and 0% of the multiply-accumulates run in it"):
        check_honoured("int8", by_node, counts, [], "engine")


def test_where_nothing_can_be_counted_every_layer_is_one() -> None:
    counts = dict.fromkeys(("a", "b", "inside a loop"))
    typed = {"a": "fp16", "b": "fp32"}
    with pytest.raises(EngineError, match=r"50% of the layers, whose multiply-accumulates cannot be counted, .* b \(fp32\)"):
        check_honoured("fp16", typed, counts, [], "engine")
    check_honoured("fp16", {"a": "fp16", "b": "fp16"}, counts, [], "engine")
    check_honoured("fp16", {}, counts, [], "engine")
