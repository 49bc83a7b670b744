"""What counts as INT8 or FP8 in a network that the real TensorRT-RTX parser made, and in the inspector's description of an engine.

No engine can be inspected without a GPU: the descriptions have the form of those in `test_layers.py`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

from deploy.artifact.tensors import ShapeRange
from deploy.engine.attestation import check_honoured, engine_share, network_share
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import load_flavour
from deploy.engine.layers import EngineLayer, engine_layers
from deploy.errors import EngineError
from deploy.precision.macs import count_macs
from tests.engine.graphs import layer

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
        ("2, 5, 16", "float8e4m3fn[16, 16]", f"{ACTIVATION} {WEIGHT} [n] y = MatMul(b, c)", "fp8"),
        ("2, 5, 16", "float8e4m3fn[16, 16]", f"{WEIGHT} [n] y = MatMul(x, c)", "fp32"),
    ],
    ids=[
        "conv",
        "float weight",
        "float activation",
        "relu between",
        "conv1d",
        "transposed",
        "broadcast",
        "float matrix",
        "fp8",
        "fp8 weight",
    ],
)
def test_a_layer_is_quantized_when_both_operands_are(tmp_path: Path, shape: str, weight: str, body: str, expected: str) -> None:
    rank = shape.count(",") + 1
    output = ", ".join("abcd"[:rank])
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 19]> g (float[{shape}] x) => (float[{output}] y) <{INITIALIZERS}, {weight} w> {{ {body} }}'
    )
    declared = model.graph.value_info[0].type.tensor_type
    ones = np.ones([dim.dim_value for dim in declared.shape.dim], onnx.helper.tensor_dtype_to_np_dtype(declared.elem_type))
    model.graph.initializer.append(onnx.numpy_helper.from_array(ones, "w"))
    if "float8" in weight:  # so is the zero point
        next(tensor for tensor in model.graph.initializer if tensor.name == "z").CopyFrom(
            onnx.numpy_helper.from_array(np.zeros((), ones.dtype), "z")
        )
    del model.graph.value_info[:]
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    sizes = tuple(map(int, shape.split(",")))
    rtx = load_flavour("tensorrt-rtx")
    built = build_engine(rtx, path, [{"x": ShapeRange(min=sizes, opt=sizes, max=sizes)}], BuildOptions())
    share, by_node = network_share(built.network.definition, rtx.trt, count_macs(onnx_ir.load(path), {"x": sizes}))
    assert by_node == {"n": expected}
    assert getattr(share, expected) == 1


DESCRIBED = [
    layer("Reformatting input 0", "Reformat", inputs="Row major linear FP32"),
    layer("stem", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tile64", "stem_dq", "stem", "relu"),
    layer("middle", "CaskConvolution", "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64", "middle"),
    layer("__myl_Fc", "gemm", "", "head", inputs="BFloat16"),
    layer("tail", "CaskGemmMatrixMultiply", "sm80_xmma_gemm_f32f32_f32f32_f32_nn", "tail"),
]  # fmt: skip
COUNTS = {"stem": 500, "middle": 300, "head": 100, "tail": 50, "fused away": 50}
TYPED = {"stem": "int8", "middle": "int8", "head": "bf16", "tail": "fp32", "fused away": "fp16"}


def described(*layers: dict[str, Any]) -> list[EngineLayer]:
    return engine_layers(json.dumps({"Layers": layers}))


def test_the_precision_of_an_engine_is_what_its_layers_compute_in() -> None:
    times = {"stem": 2.0, "middle": 1.0, "__myl_Fc": 0.5, "tail": 0.5}
    share, by_node = engine_share(described(*DESCRIBED), TYPED, COUNTS, times)
    assert share.origin == "engine"
    assert share.coverage == pytest.approx(0.95)
    assert (share.int8, share.fp16, share.bf16, share.fp32) == pytest.approx((0.5, 0.35, 0.1, 0.05))
    assert share.layers == pytest.approx({"int8": 0.2, "fp16": 0.2, "bf16": 0.2, "fp32": 0.4})
    assert share.time == pytest.approx({"int8": 0.5, "fp16": 0.25, "bf16": 0.125, "fp32": 0.125})
    assert by_node["middle"] == "fp16"  # as it was built, not as it was typed
    assert by_node["fused away"] == "fp16"  # as it was typed: the inspector does not name it
    with pytest.raises(EngineError, match=r"int8 was asked for, and 50% .* middle \(fp16\)"):
        check_honoured("int8", by_node, COUNTS, [], "engine")


def test_what_the_inspector_does_not_tell_is_not_fp32_but_as_it_was_typed() -> None:
    """A dynamic batch hides all formats; the weights and the names of tactics still tell."""
    layers = described(
        layer("Reformatting CopyNode for Input Tensor 0 to a", "Reformat"),
        layer("a", "CaskConvolution", "ampere_h16816cudnn_128x128_ldg8_relu_exp_stages_64x3_large_nhwc_tn_v1", "a"),
        layer("b + relu", "CudaDepthwiseConvolution", "", weights="Half"),
        layer("c", "CaskConvolution", "", "c"),
    )
    macs = {"a": 60, "b": 35, "c": 5}
    share, by_node = engine_share(layers, {"a": "fp32", "b": "fp32", "c": "fp16"}, macs, {})
    assert by_node == dict.fromkeys("abc", "fp16")
    assert (share.fp16, share.fp32, share.coverage, share.origin) == (1, 0, pytest.approx(0.95), "engine")
    assert share.layers == {"unknown": 0.5, "fp16": 0.5}
    check_honoured("fp16", by_node, macs, [], "engine")


def test_a_network_relabelled_does_not_pass_for_an_engine() -> None:
    """Generated code without metadata keeps no names: what is left is the typed network, and it says so."""
    layers = described(layer("__myl_MulAddCast_myl3_0", "kgen", "__myl_MulAddCast_0x0f", inputs="Half"))
    share, by_node = engine_share(layers, {"a": "fp16"}, {"a": 10}, {})
    assert by_node == {"a": "fp16"}
    assert (share.fp16, share.coverage, share.origin) == (1, 0, "network")
    share, _ = engine_share(layers, {}, {"relu": 0}, {})
    assert (share.coverage, share.origin) == (1, "engine")  # nothing to multiply, nothing to tell


def test_tf32_is_not_fp32_unless_it_was_asked_for() -> None:
    layers = described(layer("a", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tile", "a"))
    share, by_node = engine_share(layers, {"a": "fp32"}, {"a": 10}, {})
    assert (share.tf32, share.fp32) == (1, 0)
    with pytest.raises(EngineError, match=r"fp32 was asked for, and 0% .* a \(tf32\)"):
        check_honoured("fp32", by_node, {"a": 10}, [], "engine")
    check_honoured("fp32", by_node, {"a": 10}, [], "engine", tf32=True)
    with pytest.raises(EngineError, match=r"fp16 was asked for, and 0% .* a \(tf32\)"):
        check_honoured("fp16", by_node, {"a": 10}, [], "engine", tf32=True)


def test_sums_in_fp16_are_told() -> None:
    tactic = "sm80_xmma_fprop_implicit_gemm_f16f16_f16{}_f16_nhwckrsc_nhwc_tilesize256x64x32"
    layers = described(
        layer("a", "CaskConvolution", tactic.format("f16"), "a"), layer("b", "CaskConvolution", tactic.format("f32"), "b")
    )
    share, _ = engine_share(layers, {"a": "fp16", "b": "fp16"}, {"a": 30, "b": 70}, {})
    assert (share.fp16, share.fp16_sums) == (1, pytest.approx(0.3))


def test_layers_that_compute_tell_more_than_generated_code_and_those_that_move_data_tell_nothing() -> None:
    conv = layer("a", "CaskConvolution", "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tile", "a")
    moves = layer("Reformatting a", "Reformat", "", "a", inputs="Float")
    cast = layer("__myl_Cast_myl0_1", "kgen", "", "a", inputs="Float")
    half = layer("__myl_Mul_myl0_2", "kgen", "", "a", inputs="Half")
    for layers, precision, coverage in (
        ((conv, moves, cast), "int8", 1),
        ((cast, conv), "int8", 1),
        ((half,), "fp16", 1),
        ((cast, half), "bf16", 0),  # one of them moves data, and nothing says which
        ((moves,), "bf16", 0),
    ):
        share, by_node = engine_share(described(*layers), {"a": "bf16"}, {"a": 1}, {})
        assert (by_node, share.coverage) == ({"a": precision}, coverage)


def test_weights_in_int8_alone_do_not_say_that_the_activations_are() -> None:
    depthwise = described(layer("a", "CudaDepthwiseConvolution", "", "a", weights="Int8"))
    for typed, coverage in (("int8", 1), ("fp16", 0)):
        share, by_node = engine_share(depthwise, {"a": typed}, {"a": 1}, {})
        assert (by_node, share.coverage) == ({"a": typed}, coverage)


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
